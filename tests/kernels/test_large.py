"""More than 2^31 elements: offsets that 32 bits cannot hold."""

import pytest
import torch
from checks import expert_operands, same_bits, same_quantized

from vllm_ue8m0 import portable, reference

E4M3 = torch.float8_e4m3fn
FAR = 2**31 + 64


def far_rows(columns, device):
    """Two rows 2^31 + 64 elements apart; the memory between them is never touched."""
    memory = torch.empty(FAR + columns, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((2, columns), (FAR, 1))
    return x.copy_(torch.randn(2, columns))


def test_act_quant_of_far_rows(device):
    x = far_rows(256, device)
    same_quantized(portable.act_quant(x, 128, True), reference.act_quant(x, 128, True))


def test_silu_mul_quant_of_far_rows(device):
    x = far_rows(512, device)
    same_quantized(
        portable.silu_mul_quant(x, 128, True), portable.silu_mul_quant(x.clone(), 128, True)
    )


def test_rms_norm_quant_of_far_rows(device):
    x, weight = far_rows(256, device), torch.rand(256, device=device)
    got = portable.rms_norm_quant(x, weight, 1e-6, x, ue8m0=True)
    wanted = portable.rms_norm_quant(x.clone(), weight, 1e-6, x.clone(), ue8m0=True)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_weight_quant_of_far_rows(device):
    w = far_rows(256, device)
    same_quantized(portable.weight_quant(w), reference.weight_quant(w))


@pytest.mark.parametrize("activation_scale", ["ue8m0", "none"])
def test_batched_experts_of_far_experts(device, monkeypatch, activation_scale):
    monkeypatch.undo()  # the memory between the experts is never touched

    def far(t):
        memory = torch.empty(FAR + t[0].numel(), dtype=t.dtype, device=device)
        return memory.as_strided(t.shape, (FAR, t.shape[2], 1)).copy_(t)

    _, w13, sf13, _, w2, sf2, *_, gran13, gran2 = expert_operands(1, 1, device, E=2, inner=64)
    x, counts = torch.randn(2, 3, 192, device=device).bfloat16(), torch.tensor([1, 3]).to(device)
    rest = (None, counts, gran13, gran2, activation_scale)
    wanted = portable.batched_experts(x, w13, sf13, None, w2, sf2, *rest)
    got = portable.batched_experts(far(x), far(w13), sf13, None, far(w2), sf2, *rest)
    assert same_bits(got[0, :1], wanted[0, :1]) and same_bits(got[1], wanted[1])


K = 7168
ROWS = 2**31 // K + 130  # a little more than 2^31 elements, not a multiple of any tile


@pytest.fixture(scope="module")
def large():
    if not torch.cuda.is_available():
        pytest.skip("takes 20 GB and a GPU")
    x = torch.empty(ROWS, K, dtype=torch.bfloat16, device="cuda")
    for part in x.split(1 << 15):
        part.normal_()
    yield x
    torch.cuda.empty_cache()


# Where offsets pass 2^31 elements and 2^31 bytes of bf16, and both ends.
PLACES = [
    slice(0, 256),
    *(slice(p // K - 64, p // K + 64) for p in (2**30, 2**31)),
    slice(-64, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["row_major", "mn_major_packed"])
def test_act_quant(large, layout):
    q, s = portable.act_quant(large, 128, True, layout=layout)
    for rows in PLACES:
        same_quantized(
            (q[rows], s[rows]), reference.act_quant(large[rows], 128, True, layout=layout)
        )


@pytest.mark.gpu
def test_silu_mul_quant(large):
    q, s = portable.silu_mul_quant(large, 128, True)
    for rows in PLACES:
        same_quantized((q[rows], s[rows]), portable.silu_mul_quant(large[rows].clone(), 128, True))


@pytest.mark.gpu
def test_rms_norm_quant(large):
    weight = torch.rand(K, device="cuda").bfloat16()
    whole = portable.rms_norm_quant(large, weight, 1e-6, large, ue8m0=True, normed=True)
    for rows in PLACES:
        x = large[rows].clone()
        part = portable.rms_norm_quant(x, weight, 1e-6, x, ue8m0=True, normed=True)
        assert all(same_bits(a[rows], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.gpu
def test_weight_quant_and_dequant(large):
    q, s = portable.weight_quant(large)
    out = portable.weight_dequant(q, s)
    for block in (0, 2**30 // K // 128, 2**31 // K // 128, ROWS // 128 - 1):
        rows = slice(block * 128, block * 128 + 128)
        wanted = reference.weight_quant(large[rows])
        same_quantized((q[rows], s[block : block + 1]), wanted)
        assert same_bits(out[rows], reference.weight_dequant(*wanted))
    tail = slice(ROWS // 128 * 128, None)
    same_quantized((q[tail], s[-1:]), reference.weight_quant(large[tail]))
