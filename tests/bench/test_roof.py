"""The roof: which sizes become which figures, and what has no FP8 product."""

import pytest
import torch
from fake_clock import DEVICE, FakeClock

from vllm_ue8m0.bench import BenchError, roof


def fake(a, w, **options):
    assert w.stride(0) == 1 and options["use_fast_accum"] and options["scale_a"].numel() == 1
    return (a.float() @ w.float()).to(options["out_dtype"])


def test_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "_scaled_mm", fake)
    clock = FakeClock({"a sum": 2.0, "an FP8 product": 4.0})
    found = roof.measure(clock, DEVICE, num_bytes=1 << 12, size=128)
    # 4,096 bytes in 2 us, 2 * 128^3 flops in 4 us
    assert found == roof.Roof(0.002, 1.0)
    assert [how[1] for how in clock.seen] == [1, "single"]


def test_no_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "_scaled_mm", fake)
    clock = FakeClock(errors={"an FP8 product": RuntimeError("needs sm_89")})
    with pytest.raises(BenchError, match=r"an FP8 product cannot be timed.*needs sm_89"):
        roof.measure(clock, DEVICE, num_bytes=1 << 12, size=16)
