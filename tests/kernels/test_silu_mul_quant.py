"""silu(gate) * up: its two roundings, and that what follows them is act_quant."""

import golden
import pytest
import torch
from checks import same_quantized

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.kernels import config, silu_mul_quant
from vllm_ue8m0.layouts import SCALE_LAYOUTS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(gate_up, group, activation_scale):
    return portable.products._silu_mul(gate_up, group, activation_scale)


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
    same_quantized((q, s), wanted)


def test_strided_rows_and_floor(device):
    wide = torch.randn(5, 640, device=device).bfloat16()
    view = wide[:, 128:384]
    got = portable.silu_mul_quant(view, 128, True, 140)
    hidden, _ = run(view.contiguous(), 128, "none")
    same_quantized(got, reference.act_quant(hidden, 128, True, 140))
    assert got[1].min() == 140


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_masked_rows_in_every_layout(device, poison, layout):
    gate_up = (torch.randn(3, 70, 600, device=device) * 4).bfloat16()
    counts = torch.tensor([33, 0, 70], device=device)
    q, s = portable.silu_mul_quant(gate_up, 128, True, layout=layout, counts=counts)
    hidden, _ = run(gate_up.view(-1, 600), 128, "none")
    wanted = reference.act_quant(hidden.view(3, 70, 300), 128, True, layout=layout)
    assert s.stride() == wanted[1].stride()
    for e, count in enumerate(counts.tolist()):
        same_quantized((q[e, :count], s[e, :count]), (wanted[0][e, :count], wanted[1][e, :count]))
        assert (q[e, count:].view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_permuted_rows(device, poison, layout):
    gate_up = (torch.randn(37, 600, device=device) * 4).bfloat16()
    places = torch.randperm(50)[:37, None].to(torch.int32).to(device)
    places[5] = -1
    kind = {"layout": layout, "destinations": places, "out_rows": 50}
    q, s = portable.silu_mul_quant(gate_up, 128, True, **kind)
    hidden, _ = run(gate_up, 128, "none")
    wanted = reference.act_quant(hidden, 128, True, **kind)
    written = places[places >= 0].to(torch.int64)
    same_quantized((q[written], s[written]), (wanted[0][written], wanted[1][written]))


def test_empty(device):
    q, s = run(torch.zeros(0, 256, device=device), 128, "ue8m0")
    assert q.shape == (0, 128) and s.shape == (0, 1)


@pytest.mark.parametrize(
    ("rows", "columns", "experts", "early"),
    [
        (1, 2048, False, True),
        (8, 2048, False, True),
        (9, 2048, False, False),
        (64, 2048, False, False),
        (64, 2304, False, True),
        (1, 2048, True, False),
    ],
)
def test_which_start_their_product(rows, columns, experts, early):
    """Not those of many rows that are as narrow as shared experts', nor any of routed ones."""
    gate_up = torch.zeros(1, rows, 2 * columns, dtype=torch.bfloat16)
    counts = torch.ones(1, dtype=torch.int32) if experts else None
    out = torch.zeros(1, rows, columns, dtype=torch.float8_e4m3fn)
    s = torch.zeros(1, rows, columns // 128, dtype=torch.uint8)
    described = silu_mul_quant.launch.__wrapped__(
        gate_up, out, s, 128, 0, False, config.TileConfig(1, 4, 1), counts
    )
    names = silu_mul_quant._silu_mul_quant_kernel.arg_names
    assert dict(zip(names, described.args, strict=False))["early"] == early
