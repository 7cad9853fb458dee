"""Real vLLM layers loaded through the method: each rank serves its slice of the checkpoint."""

import pytest
import torch

pytest.importorskip("vllm")
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as L

from vllm_ue8m0 import reference
from vllm_ue8m0.checkpoint.serving import TP_SIZES, cuts, layer_of
from vllm_ue8m0.codec import convert_scale_from_ue8m0
from vllm_ue8m0.plugin.config import Ue8m0Config

C = 1.3228756189346313


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def tp(monkeypatch):
    """Build layers as rank `rank` of `size` without starting processes."""

    def be(rank, size):
        for name, value in (("rank", rank), ("world_size", size)):
            target = f"get_tensor_model_parallel_{name}"
            for module in ("model_executor.layers.linear", "model_executor.parameter"):
                monkeypatch.setattr(f"vllm.{module}.{target}", lambda v=value: v)

    be(0, 1)
    return be


def checkpoint(n, k, factor=1.0, dtype=torch.float32):
    w = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    w[(w & 0x7F) == 0x7F] = 1
    sf = torch.randint(110, 130, (-(-n // 128), -(-k // 128)), dtype=torch.uint8)
    scale = convert_scale_from_ue8m0(sf) * factor
    values = reference.dequantize(w.view(torch.float8_e4m3fn), scale, (128, 128))
    return w.view(torch.float8_e4m3fn), scale.to(dtype), values


def config(**options):
    return Ue8m0Config.from_config({"quant_method": "ue8m0", **options})


def load(layer, w, scale, *shard):
    layer.weight.weight_loader(layer.weight, w, *shard)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *shard)


def served(layer):
    """The float32 weight that `apply` multiplies with."""
    layer.quant_method.process_weights_after_loading(layer)
    sf, c = layer.weight_scale_inv.data, layer.weight_scale_c
    return reference.dequantize(layer.weight.data, sf, layer.quant_method.gran, c)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [1.0, C])
def test_column_parallel(tp, size, factor):
    w, scale, values = checkpoint(1536, 320, factor)  # 8 ranks: 192 rows, cut at 64
    for rank in range(size):
        tp(rank, size)
        layer = L.ColumnParallelLinear(320, 1536, bias=False, quant_config=config())
        load(layer, w, scale)
        assert torch.equal(served(layer), values.chunk(size)[rank])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_row_parallel(tp, size):
    w, scale, values = checkpoint(200, 1536)  # 8 ranks: 192 columns each
    for rank in range(size):
        tp(rank, size)
        layer = L.RowParallelLinear(1536, 200, bias=False, quant_config=config())
        load(layer, w, scale)
        assert torch.equal(served(layer), values.chunk(size, dim=1)[rank])
        assert layer.quant_method.gran == (128, 64 if size == 8 else 128)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_merged_column_each_shard_its_own_c(tp, size):
    parts = [checkpoint(576, 192, C), checkpoint(576, 192, 1.0)]
    for rank in range(size):
        tp(rank, size)
        layer = L.MergedColumnParallelLinear(192, [576, 576], bias=False, quant_config=config())
        for shard, (w, scale, _) in enumerate(parts):
            load(layer, w, scale, shard)
        expected = torch.cat([values.chunk(size)[rank] for _, _, values in parts])
        assert torch.equal(served(layer), expected)
        assert layer.weight_scale_inv.dtype == torch.uint8


def test_fused_qkv_a_of_deepseek(tp):
    """1536 + 576 rows, not sharded: 12 + 5 scale rows on the plain grid."""
    parts = [checkpoint(1536, 256), checkpoint(576, 256)]
    layer = L.MergedColumnParallelLinear(
        256, [1536, 576], bias=False, quant_config=config(), disable_tp=True
    )
    for shard, (w, scale, _) in enumerate(parts):
        load(layer, w, scale, shard)
    assert layer.weight_scale_inv.shape == (17, 2)
    assert torch.equal(served(layer), torch.cat([values for _, _, values in parts]))


@pytest.mark.parametrize("size", [1, 3, 9])
def test_qkv_of_smollm2(tp, size):
    """Nine heads of 64 and three KV heads, replicated on nine ranks; 576 is 4.5 blocks."""
    parts = {"q": checkpoint(576, 576, C), "k": checkpoint(192, 576), "v": checkpoint(192, 576)}
    for rank in range(size):
        tp(rank, size)
        layer = L.QKVParallelLinear(576, 64, 9, 3, bias=False, quant_config=config())
        for shard, (w, scale, _) in parts.items():
            load(layer, w, scale, shard)
        kv = min(size, 3)
        slices = [
            parts["q"][2].chunk(size)[rank],
            *(parts[name][2].chunk(kv)[rank * kv // size] for name in "kv"),
        ]
        assert torch.equal(served(layer), torch.cat(slices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, "e8m0"])
def test_replicated_with_scales_in_other_containers(tp, dtype):
    w, scale, values = checkpoint(200, 300)
    sf = (scale.view(torch.int32) >> 23).to(torch.uint8)
    stored = {torch.uint8: sf, "e8m0": sf.view(torch.float8_e8m0fnu)}.get(dtype)
    layer = L.ReplicatedLinear(300, 200, bias=False, quant_config=config())
    load(layer, w, scale.to(dtype) if stored is None else stored)
    assert torch.equal(served(layer), values)


def test_apply_identity_reproduces_the_weight(tp):
    """What MLA does to absorb kv_b_proj, exact under UE8M0 activations; no AMX shortcut left."""
    w, scale, values = checkpoint(1024, 512)
    layer = L.ColumnParallelLinear(
        512, 1024, bias=False, quant_config=config(), prefix="model.layers.0.self_attn.kv_b_proj"
    )
    load(layer, w, scale)
    layer.quant_method.process_weights_after_loading(layer)
    eye = torch.eye(512)
    assert torch.equal(layer.quant_method.apply(layer, eye).t(), values)
    assert not hasattr(layer, "weight_block_size")


def test_ignored_layers_stay_unquantized(tp):
    quant = config(modules_to_not_convert=["model.proj"])
    layer = L.RowParallelLinear(256, 128, bias=False, quant_config=quant, prefix="model.proj")
    assert isinstance(layer.quant_method, L.UnquantizedLinearMethod)


def test_bias_and_leading_shape(tp):
    w, scale, values = checkpoint(130, 256)
    layer = L.ReplicatedLinear(
        256, 130, bias=True, quant_config=config(), params_dtype=torch.bfloat16
    )
    load(layer, w, scale)
    layer.bias.data = torch.randn(130).bfloat16()
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    a = reference.fake_quant(x, 128, "ue8m0").double()
    expected = a @ values.double().t() + layer.bias.double()
    out = layer(x)[0]
    assert out.shape == (2, 3, 130) and out.dtype == torch.bfloat16
    bound = 2**-8 * expected.abs() + 1e-5 * (a.abs() @ values.double().abs().t() + 1)
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda w, s: (w.to(torch.bfloat16), s), "expected torch.float8_e4m3fn"),
        (lambda w, s: (w, s.t().contiguous()), r"m\.proj: a weight scale of shape \(2, 3\)"),
        (lambda w, s: (w, s[:2]), r"m\.proj: a weight scale of shape \(2, 2\)"),
        (lambda w, s: (w, s * torch.nan), r"m\.proj: .*is NaN"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tp, mutate, message):
    w, scale, _ = checkpoint(300, 256)
    layer = L.ReplicatedLinear(256, 300, bias=False, quant_config=config(), prefix="m.proj")
    with pytest.raises(ValueError, match=message):
        load(layer, *mutate(w, scale))


def test_missing_scale_is_noticed(tp):
    w, _, _ = checkpoint(300, 256)
    layer = L.ReplicatedLinear(256, 300, bias=False, quant_config=config(), prefix="m.proj")
    layer.weight.weight_loader(layer.weight, w)
    with pytest.raises(ValueError, match=r"m\.proj: no weight scale was loaded"):
        layer.quant_method.process_weights_after_loading(layer)


def test_shards_too_thin_for_a_scale_group_are_refused(tp):
    tp(0, 32)
    with pytest.raises(ValueError, match=r"m\.proj: 16 input columns .* --tensor-parallel-size"):
        L.RowParallelLinear(512, 128, bias=False, quant_config=config(), prefix="m.proj")


def test_options_enter_the_compile_hash(tp):
    hashes = set()
    for options in ({}, {"activation_scale": "fp32"}, {"non_pow2": "requant"}):
        vllm_config = VllmConfig(additional_config={"ue8m0": options} if options else {})
        with set_current_vllm_config(vllm_config):
            quant = config()
            L.ReplicatedLinear(128, 128, bias=False, quant_config=quant)
        assert quant.spec.activation_scale == options.get("activation_scale", "ue8m0")
        hashes.add(vllm_config.compute_hash())
        # the same options, from the checkpoint's own quantization_config
        other = VllmConfig()
        with set_current_vllm_config(other):
            L.ReplicatedLinear(128, 128, bias=False, quant_config=config(**options))
        assert other.compute_hash() == vllm_config.compute_hash()
    assert len(hashes) == 3


def test_unknown_option_is_refused(tp):
    vllm_config = VllmConfig(additional_config={"ue8m0": {"activation_scales": "fp32"}})
    with (
        set_current_vllm_config(vllm_config),
        pytest.raises(ValueError, match="unknown ue8m0 option 'activation_scales'"),
    ):
        L.ReplicatedLinear(128, 128, bias=False, quant_config=config())


@pytest.mark.skipif(
    vllm.__version_tuple__[:2] < (0, 31), reason="AMX attention requantizes nothing before 0.31"
)
def test_amx_attention_takes_kv_b_proj_exactly(tp, monkeypatch):
    """vLLM's AMX MLA backend must not requantize kv_b_proj to one scale; packing is left out."""
    from types import SimpleNamespace

    from vllm.v1.attention.backends.mla import amx_mla

    w, scale, values = checkpoint(1024, 512)
    layer = L.ColumnParallelLinear(
        512, 1024, bias=False, quant_config=config(), prefix="model.layers.0.self_attn.kv_b_proj"
    )
    load(layer, w, scale)
    layer.quant_method.process_weights_after_loading(layer)

    def requantize(*args):
        raise AssertionError("kv_b_proj was requantized per tensor")

    monkeypatch.setattr(amx_mla, "_block_quant_to_tensor_quant", requantize)
    packed = []
    keep = lambda t: packed.append(t) or t  # noqa: E731
    monkeypatch.setattr(torch.ops._C, "convert_weight_packed", keep, raising=False)
    impl = SimpleNamespace(
        kv_b_proj=layer, kv_lora_rank=512, num_heads=4, qk_nope_head_dim=128, v_head_dim=128
    )
    amx_mla.AMXMLAImpl.process_weights_after_loading(impl, torch.float32)
    assert impl._w_scale is None
    k, v = values.view(4, 256, 512).split(128, dim=1)  # [heads, nope | v, latent]
    assert {tuple(t.shape) for t in packed} == {(4, 512, 128), (4, 128, 512)}
    for found in packed:
        assert any(torch.equal(found, t) for t in (k.transpose(1, 2), v))


LAYERS = {
    "gate_up_proj": (
        lambda: L.MergedColumnParallelLinear(128, [1536, 1536], bias=False, quant_config=config()),
        [("gate_proj", (1536, 128)), ("up_proj", (1536, 128))],
    ),
    "down_proj": (
        lambda: L.RowParallelLinear(1536, 128, bias=False, quant_config=config()),
        [("down_proj", (128, 1536))],
    ),
    "qkv_proj": (
        lambda: L.QKVParallelLinear(128, 96, 32, 8, bias=False, quant_config=config()),
        [("q_proj", (3072, 128)), ("k_proj", (768, 128)), ("v_proj", (768, 128))],
    ),
    "fused_qkv_a_proj": (
        lambda: L.MergedColumnParallelLinear(
            128, [192, 576], bias=False, quant_config=config(), disable_tp=True
        ),
        [("kv_a_proj_with_mqa", (576, 128)), ("q_a_proj", (192, 128))],
    ),
}


@pytest.mark.parametrize("size", TP_SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_inspect_foretells_the_grid(tp, name, size):
    build, weights = LAYERS[name]
    members = [(f"layers.0.{leaf}.weight", shape) for leaf, shape in weights]
    layer = layer_of(members[0][0])
    assert layer.name == f"layers.0.{name}"
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    foretold = cuts(layer, members, heads).get(size, (128, 128))
    tp(0, size)
    if isinstance(foretold, str):
        with pytest.raises(ValueError, match="scale groups of 16 columns"):
            build()
    else:
        assert build().weight_block_size == list(foretold)
