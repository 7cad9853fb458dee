"""The weight policy on tensors: exact where it claims to be, refused where it must be."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm_ue8m0 import reference
from vllm_ue8m0.codec import convert_scale_from_ue8m0
from vllm_ue8m0.plugin.weights import decode_loaded_scale, encode

C = 1.3228756189346313  # the factor in DeepSeek-V3.1's o_proj scales
BLOCK = (128, 128)


def random_weight(n=300, k=260, experts=()):
    w = torch.randint(0, 256, (*experts, n, k), dtype=torch.uint8)
    w[(w & 0x7F) == 0x7F] = 0
    k_of = torch.randint(100, 140, (*experts, -(-n // 128), -(-k // 128)), dtype=torch.uint8)
    return w.view(torch.float8_e4m3fn), convert_scale_from_ue8m0(k_of)


def values(w, scale, gran=BLOCK, c=None):
    return reference.dequantize(w, scale, gran, c).double()


def test_pow2_becomes_bytes_exactly():
    w, scale = random_weight()
    done = encode(w, scale, [3], BLOCK, "keep", "layer")
    assert (done.kind, done.sf.dtype, done.c) == ("bytes", torch.uint8, None)
    assert done.w is w
    assert torch.equal(convert_scale_from_ue8m0(done.sf), scale)


def test_factored_becomes_bytes_and_one_c_exactly():
    w, scale = random_weight()
    scale = scale * torch.tensor(C)
    done = encode(w, scale, [3], BLOCK, "error", "layer")
    assert done.kind == "bytes and c"
    assert torch.equal(done.c, torch.full((3,), C))
    assert torch.equal(convert_scale_from_ue8m0(done.sf) * done.c[:, None], scale)


def test_c_belongs_to_each_shard_of_a_fused_layer():
    w, scale = random_weight()
    scale[:1] *= C
    scale[1:] *= 1.5
    done = encode(w, scale, [1, 2], BLOCK, "keep", "layer")
    assert done.kind == "bytes and c"
    assert done.c.tolist() == [torch.tensor(C).item(), 1.5, 1.5]
    assert torch.equal(convert_scale_from_ue8m0(done.sf) * done.c[:, None], scale)


def test_c_belongs_to_each_expert_and_shard():
    w, scale = random_weight(256, 260, experts=(3,))
    factors = torch.tensor([[1.0, C], [1.25, 1.5], [C, 1.0]])
    scale = scale * factors[:, :, None]
    done = encode(w, scale, [1, 1], BLOCK, "keep", "layer")
    assert torch.equal(done.c, factors)
    assert torch.equal(convert_scale_from_ue8m0(done.sf) * factors[:, :, None], scale)


@pytest.mark.parametrize("experts", [(), (2,)])
def test_arbitrary_scales_keep_requant_error(experts):
    quantized = [reference.weight_quant(torch.randn(300, 260), ue8m0=False) for _ in range(2)]
    w, scale = (
        torch.stack(parts) if experts else parts[0] for parts in zip(*quantized, strict=True)
    )
    kept = encode(w, scale, [3], BLOCK, "keep", "layer")
    assert kept.kind == "float32 kept"
    assert kept.sf is not None and torch.equal(kept.sf, scale) and kept.w is w
    done = encode(w, scale, [3], BLOCK, "requant", "layer")
    assert done.kind == "requantized" and done.sf.dtype == torch.uint8
    before, after = values(w, scale), values(done.w, done.sf)
    assert 1e-3 < (after - before).norm() / before.norm() < 0.028
    with pytest.raises(ValueError, match=r"layer: .*'keep'.*'requant'"):
        encode(w, scale, [3], BLOCK, "error", "layer")


def test_requantizing_a_shard_gives_the_shard_of_the_requantized():
    w, scale = random_weight(256, 256)
    scale = scale * (1 + torch.rand_like(scale))
    whole = encode(w, scale, [2], BLOCK, "requant", "layer")
    fine = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    part = encode(w[64:192], fine[1:3], [2], (64, 64), "requant", "layer")
    assert torch.equal(part.w.view(torch.uint8), whole.w[64:192].view(torch.uint8))


def test_relabelling_is_impossible():
    """No policy returns bytes whose values differ from the checkpoint's by a scale."""
    for policy in ("keep", "requant"):
        for _ in range(20):
            w, scale = random_weight(130, 130)
            scale = scale * (1 + torch.randint(0, 3, scale.shape) / 2)
            done = encode(w, scale, [2], BLOCK, policy, "layer")
            got = values(done.w, done.sf, c=done.c)
            # half a unit in e4m3's last place; a relabelled block is off by a third or more
            assert (got - values(w, scale)).norm() <= 2**-4 * values(w, scale).norm()


@pytest.mark.parametrize("small", [0.0, 2.0**-127, 1e-40])
def test_zero_scale_passes_only_over_zero_weights(small):
    w, scale = random_weight(256, 256)
    scale[1, 0] = small
    what = "zero" if small == 0 else r"below 2\^-126"
    with pytest.raises(ValueError, match=rf"layer: .*block \(1, 0\) is {what}.*, but the block"):
        encode(w, scale, [2], BLOCK, "keep", "layer")
    w.view(torch.uint8)[128:, :128] = 0x80  # minus zero counts as zero
    done = encode(w, scale, [2], BLOCK, "keep", "layer")
    assert done.kind == "bytes" and int(done.sf.min()) >= 1
    assert torch.equal(values(w, scale), values(done.w, done.sf))


def test_never_loaded_scale_or_weight_is_noticed():
    w, scale = random_weight()
    scale[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer: no weight scale was loaded"):
        encode(w, scale, [3], BLOCK, "keep", "layer")
    w, scale = random_weight()
    w.view(torch.uint8)[7, 7] = 0xFF
    with pytest.raises(ValueError, match="layer: the FP8 weight holds NaN codes"):
        encode(w, scale, [3], BLOCK, "keep", "layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, "e8m0"])
def test_scales_are_read_by_value_from_every_container(dtype):
    code = torch.randint(1, 255, (3, 2), dtype=torch.uint8)
    scale = convert_scale_from_ue8m0(code)
    stored = {torch.uint8: code, "e8m0": code.view(torch.float8_e8m0fnu)}.get(dtype)
    if stored is None:
        stored = scale.to(dtype)
    assert torch.equal(decode_loaded_scale(stored, BLOCK, BLOCK, "layer"), scale)
    fine = decode_loaded_scale(stored, (64, 32), BLOCK, "layer")
    assert torch.equal(fine, scale.repeat_interleave(2, 0).repeat_interleave(4, 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), r"layer: .*block \(0, 1\) is NaN"),
        (torch.tensor([[1.0], [torch.inf]]), r"layer: .*block \(1, 0\) is infinite"),
        (torch.tensor([[-1.0]]), "layer: .*negative"),
        (torch.tensor([[255]], dtype=torch.uint8), "layer: .*byte 255"),
        (torch.tensor([[3]], dtype=torch.int64), "layer: scale dtype torch.int64"),
        (torch.tensor(1.0), "layer: .*not block FP8"),
    ],
)
def test_bad_scales_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        decode_loaded_scale(bad, BLOCK, BLOCK, "layer")
