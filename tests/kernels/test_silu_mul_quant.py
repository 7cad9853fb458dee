"""silu(gate) * up: its two roundings, and that what follows them is act_quant."""

import golden
import pytest
import torch
from checks import same_bits

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.kernels import silu_mul_quant

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(gate_up, group, activation_scale):
    return portable._silu_mul(gate_up, group, activation_scale)


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of dtype at float64 x."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.log2(x.abs().clamp(min=info.smallest_normal)).floor()) * info.eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(device, dtype):
    gate_up = (torch.randn(17, 600, device=device) * 4).to(dtype)
    gate_up[0, :8] = torch.tensor([0.0, -0.0, 30.0, -30.0, 88.0, -80.0, 1e-3, -1e-3])
    hidden, s = run(gate_up, 128, "none")
    assert s is None and hidden.dtype == dtype and hidden.shape == (17, 300)
    gate, up = gate_up.double().chunk(2, -1)
    silu = gate / (1 + torch.exp(-gate))
    # Each of the two roundings may go the other way where the fast exponential is a few float32
    # ulp off; at -80 the rounding of the argument alone costs 2^-17.
    error = (hidden.double() - silu * up).abs()
    bound = (ulp(silu, dtype) + silu.abs() * 2.0**-16) * up.abs() + ulp(silu * up, dtype)
    assert (error <= bound).all()
    if dtype == torch.bfloat16:
        rounded_once = (silu * up).to(dtype)
        rounded_twice = silu.to(torch.float32).to(dtype) * up.to(dtype)
        assert not torch.equal(rounded_once, rounded_twice)  # the data tells them apart
        assert (hidden != rounded_twice).float().mean() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_are_exact(device, dtype):
    """silu(g) rounds to g, so the result is the rounded product."""
    gate = torch.arange(32, 96, device=device).to(dtype)
    up = (torch.randn(64, device=device) * 3).to(dtype)
    hidden, _ = run(torch.cat([gate, up])[None], 32, "none")
    assert torch.equal(hidden[0], gate * up)


@pytest.mark.parametrize("activation_scale", ["ue8m0", "fp32"])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizes_as_act_quant(device, dtype, group, activation_scale):
    gate_up = (torch.randn(17, 600, device=device) * 4).to(dtype)
    gate_up[2], gate_up[3, 5], gate_up[4, 310] = 0, golden.NAN, golden.INF
    hidden, _ = run(gate_up, group, "none")
    q, s = run(gate_up, group, activation_scale)
    wanted = reference.act_quant(hidden, group, activation_scale == "ue8m0")
    assert same_bits(q, wanted[0]) and same_bits(s, wanted[1])


def test_strided_rows_and_floor(device):
    wide = torch.randn(5, 640, device=device).bfloat16()
    view = wide[:, 128:384]
    out = torch.empty(5, 128, dtype=torch.float8_e4m3fn, device=device)
    s = torch.empty(5, 1, dtype=torch.uint8, device=device)
    silu_mul_quant.launch(view, out, s, 128, 140)
    hidden, _ = run(view.contiguous(), 128, "none")
    wanted = reference.act_quant(hidden, 128, True, 140)
    assert same_bits(out, wanted[0]) and same_bits(s, wanted[1])


def test_empty(device):
    q, s = run(torch.zeros(0, 256, device=device), 128, "ue8m0")
    assert q.shape == (0, 128) and s.shape == (0, 1)
