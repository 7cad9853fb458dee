"""What the sm_100 backend hands to portable, and why; its results are in tests/kernels."""

import pytest
import torch

from vllm_ue8m0 import portable, sm100

E4M3, U8, F32, E8M0 = torch.float8_e4m3fn, torch.uint8, torch.float32, torch.float8_e8m0fnu
GRAN = (128, 128)


def empty(*shape, dtype=E4M3):
    return torch.empty(shape, dtype=dtype, device="meta")


def refused(sf=U8, gran=GRAN, activation_scale="ue8m0"):
    x, w = empty(3, 256, dtype=torch.bfloat16), empty(192, 256)
    return sm100.refusal(x, w, empty(2, 2, dtype=sf), gran, activation_scale)


def test_refusals():
    assert refused() is None
    assert refused(sf=E8M0, gran=(48, 32)) is None
    assert "not quantized" in refused(activation_scale="none")
    assert "activation scales are fp32" in refused(activation_scale="fp32")
    assert "scales of w are torch.float32" in refused(sf=F32)
    assert "groups of 48 along K" in refused(gran=(128, 48))
    assert "groups of 16 along K" in refused(gran=(128, 16))


@pytest.mark.parametrize("wrong", [None, "sf13", "sf2", "gran13", "gran2", "activations"])
def test_refusals_of_experts(wrong):
    x, w13, w2 = empty(3, 256, dtype=torch.bfloat16), empty(4, 512, 256), empty(4, 256, 256)
    sf13, sf2 = (
        empty(4, 4, 2, dtype=F32 if wrong == name else U8) for name in ("sf13", "sf2")
    )  # fmt: skip
    gran13, gran2 = ((128, 16) if wrong == name else GRAN for name in ("gran13", "gran2"))
    scale = "fp32" if wrong == "activations" else "ue8m0"
    reason = sm100.experts_refusal(x, w13, sf13, w2, sf2, gran13, gran2, scale)
    assert (reason is None) == (wrong is None)


@pytest.mark.parametrize("a_scale", [U8, E8M0, F32, None])
@pytest.mark.parametrize("w_scale", [U8, E8M0, F32])
def test_only_two_bytes_are_scaled_by_the_tensor_cores(monkeypatch, a_scale, w_scale):
    calls = []
    monkeypatch.setattr(portable, "gemm", lambda *a, block_scaled: calls.append(block_scaled))
    a_s = None if a_scale is None else empty(3, 2, dtype=a_scale)
    sf = empty(2, 2, dtype=w_scale)
    sm100.gemm(empty(3, 256), a_s, empty(192, 256), sf, None, None, GRAN, torch.bfloat16)
    assert calls == [a_scale in (U8, E8M0) and w_scale in (U8, E8M0)]


def test_plans_are_those_of_what_runs():
    x, w = empty(1, 256, dtype=torch.bfloat16), empty(192, 256)
    own, other = (
        sm100.linear_plan(x, w, empty(2, 2, dtype=dtype), GRAN, "ue8m0") for dtype in (U8, F32)
    )
    theirs = portable.linear_plan(x, w, empty(2, 2, dtype=U8), GRAN, "ue8m0")
    rows = [1, 16, 17, 33, 500, 513, 9000]
    assert [other(M) for M in rows] == [theirs(M) for M in rows]
    assert all(own(M) != theirs(M) for M in rows)
    assert len({own(M) for M in rows}) == 5  # four tiles; act_quant's for few and many rows


def test_described():
    assert sm100.describe("gemm", 1, 7168, 2048) == (
        "sm100 gemm, tile 16 x 128 x 128, 4 warps, block-scaled"
    )
    assert sm100.describe("linear", 4096, 7168, 2048).startswith("sm100 linear, tile 128 x 128")
