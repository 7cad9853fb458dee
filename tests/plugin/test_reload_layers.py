"""vLLM's layerwise reload on single layers: the same values in the same memory, or refused."""

from types import SimpleNamespace

import pytest
import torch
from checks import random_codes, same_bits

pytest.importorskip("vllm")

from moe_layers import E, checkpoint, create, moe_config, run, tokens
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from vllm_ue8m0 import reference
from vllm_ue8m0.codec import convert_scale_from_ue8m0
from vllm_ue8m0.plugin.config import Ue8m0Config
from vllm_ue8m0.plugin.linear import Ue8m0LinearMethod

N, K = 256, 384
C = 1.3228756189346313  # the factor in DeepSeek-V3.1's o_proj scales
KINDS = ("bytes", "bytes and c", "float32 kept")
HOLDS = {"bytes": KINDS[:1], "bytes and c": KINDS[:2], "float32 kept": KINDS}


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch):
    for name, value in (("rank", 0), ("world_size", 1)):
        target = f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}"
        monkeypatch.setattr(target, lambda value=value: value)
    empty_strided = torch.empty_strided
    # What a reload makes anew looks like weights until they are loaded.
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: empty_strided(*a, **k).fill_(1))
    with set_current_vllm_config(VllmConfig()):
        yield


def copy(param, loaded_weight, half=None):
    """A loader; half: gate or up, which checkpoints have apart."""
    part = param.data if half is None else param.data.chunk(2, 1)[half]
    part.copy_(loaded_weight)


def weights(kind):
    scale = convert_scale_from_ue8m0(torch.randint(116, 121, (2, 3), dtype=torch.uint8))
    if kind == "bytes and c":
        scale = scale * C
    elif kind == "float32 kept":
        scale = scale * (1 + 0.3 * torch.rand(scale.shape))
    return {"weight": random_codes(N, K, device="cpu"), "weight_scale_inv": scale}


def linear(prefix="layers.0.o_proj", **options):
    config = Ue8m0Config.from_config(
        {"quant_method": "fp8", "weight_block_size": [128, 128], **options}
    )
    layer = torch.nn.Module()
    layer.quant_method = method = Ue8m0LinearMethod(config, prefix)
    method.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=copy)
    record_metadata_for_reloading(layer)
    return layer


def load(layer, tensors):
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        if name.startswith("w13"):
            for half, part in enumerate(tensor.chunk(2, 1)):
                param.weight_loader(param, part, half)
        else:
            param.weight_loader(param, tensor)


def first_load(layer, tensors):
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)


def reload(layer, tensors):
    initialize_layerwise_reload(layer)
    load(layer, tensors)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))


def values(layer):
    return reference.dequantize(
        layer.weight.data, layer.weight_scale_inv.data, (128, 128), layer.weight_scale_c
    )


@pytest.mark.parametrize("served", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_every_kind_over_every_kind(served, new):
    layer, tensors = linear(), weights(new)
    first_load(layer, weights(served))
    before = {name: (p.data_ptr(), p.dtype) for name, p in layer.named_parameters()}
    if new not in HOLDS[served]:
        with pytest.raises(ValueError, match=r"o_proj: the weight scales to reload are .* allowed"):
            reload(layer, tensors)
        return
    reload(layer, tensors)
    assert {name: (p.data_ptr(), p.dtype) for name, p in layer.named_parameters()} == before
    expected = reference.dequantize(tensors["weight"], tensors["weight_scale_inv"], (128, 128))
    if (served, new) == ("bytes and c", "bytes and c"):
        assert torch.allclose(values(layer), expected, rtol=2**-22, atol=0)  # two products
    else:
        assert torch.equal(values(layer), expected)


def test_requantized_over_requantized():
    layer, same = linear(non_pow2="requant"), linear(non_pow2="requant")
    first_load(layer, weights("float32 kept"))
    tensors = weights("float32 kept")
    reload(layer, tensors)
    first_load(same, tensors)
    assert torch.equal(values(layer), values(same))


def test_kv_b_proj_without_its_block_size():
    layer, tensors = linear("layers.0.kv_b_proj"), weights("bytes")
    first_load(layer, weights("bytes"))
    assert not hasattr(layer, "weight_block_size")
    reload(layer, tensors)
    expected = reference.dequantize(tensors["weight"], tensors["weight_scale_inv"], (128, 128))
    assert torch.equal(values(layer), expected)


@pytest.mark.parametrize("missing, message", [
    ("weight", "NaN codes, or was not in the checkpoint"),
    ("weight_scale_inv", "no weight scale was loaded"),
])  # fmt: skip
def test_a_reload_without_all_of_a_layer_is_refused(missing, message):
    layer, tensors = linear(), weights("bytes")
    first_load(layer, weights("bytes"))
    del tensors[missing]
    with pytest.raises(ValueError, match=message):
        reload(layer, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_into_served_weights_is_refused(kind):
    layer = linear()
    first_load(layer, weights(kind))
    expected = values(layer)
    for name, tensor in weights(kind).items():
        with pytest.raises(ValueError, match=r"o_proj: load_weights .*'reload_weights'"):
            load(layer, {name: tensor})
    layer.quant_method.process_weights_after_loading(layer)  # as some call it: nothing is new
    assert torch.equal(values(layer), expected)


def experts(scales, **options):
    """A layer of experts that vLLM can reload, with its method; loaded."""
    method, layer = create(moe_config(eplb=True), load=copy, **options)
    layer.quant_method = method
    record_metadata_for_reloading(layer)
    first_load(layer, named(scales))
    return method, layer


def named(scales):
    return {
        f"{name}_{part}": tensor
        for name, tensors in scales.items()
        for part, tensor in zip(("weight", "weight_scale_inv"), tensors, strict=True)
    }


@pytest.mark.parametrize("options", [{"scale_fmt": "ue8m0"}, {}], ids=["bytes", "float32"])
def test_experts_run_and_move_after_a_reload(options):
    """Their kernel has the tensors that a reload fills, and that load balancing moves then."""
    new = checkpoint(c=torch.rand(E, 1, 1) + 1)
    method, layer = experts(checkpoint(), **options)
    fresh_method, fresh = experts(new, **options)
    x, weights, ids = tokens(9)
    expected = run(fresh_method, fresh, x, weights, ids)
    assert not same_bits(run(method, layer, x, weights, ids), expected)
    reload(layer, named(new))
    assert same_bits(run(method, layer, x, weights, ids), expected)
    order = torch.tensor([2, 0, 3, 1])
    for param in layer.parameters():
        rows = param.data.view(torch.uint8) if param.dtype == torch.float8_e4m3fn else param.data
        rows.copy_(rows[order])
    assert same_bits(run(method, layer, x, weights, order.argsort()[ids]), expected)


def test_experts_are_refused_like_linear_layers():
    method, layer = create(moe_config(), load=copy)
    layer.quant_method = method
    record_metadata_for_reloading(layer)
    first_load(layer, named(checkpoint()))
    with pytest.raises(ValueError, match=r"experts\.w13: load_weights on a model"):
        load(layer, named(checkpoint()))
    with pytest.raises(ValueError, match=r"experts\.w13: the weight scales to reload are c"):
        reload(layer, named(checkpoint(c=C)))
