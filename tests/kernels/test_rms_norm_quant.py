"""RMSNorm and quantization: each step's rounding, and that rows do not depend on each other."""

import golden
import pytest
import torch
from checks import same_bits, same_quantized

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.layouts import SCALE_LAYOUTS

BACKENDS = pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def operands(M, K, dtype, device):
    x = torch.randn(M, K, device=device) * torch.randn(M, 1, device=device).exp()
    return x.to(dtype), torch.rand(K, device=device).add(0.5).to(dtype)


def assert_norm(normed, r, weight, eps=EPS):
    """normed is the rounding of the exact norm of r, up to 2^-20 of it where it is that close.

    The float32 sum over a row, the division, the root and two products leave about 2^-21.
    """
    exact = r.double() / (r.double().square().mean(-1, keepdim=True) + eps).sqrt()
    exact *= weight.double()
    bounds = [(exact * (1 + sign * 2.0**-20)).to(normed.dtype) for sign in (-1, 1)]
    low, high = torch.minimum(*bounds), torch.maximum(*bounds)
    assert ((low <= normed) & (normed <= high)).all()
    if normed.dtype == torch.bfloat16:
        assert (normed != exact.to(torch.bfloat16)).double().mean() < 2e-3
    assert normed.abs().max() > 0.5


@BACKENDS
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("K", [70, 300, 512, 1536, 2100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps(backend, device, poison, dtype, K, with_residual):
    x, weight = operands(5, K, dtype, device)
    residual = operands(5, K, dtype, device)[0] if with_residual else None
    out = backend.rms_norm_quant(x, weight, EPS, residual, ue8m0=True, normed=True)
    assert len(out) == 4 if with_residual else 3
    q, s, normed = out[0], out[1], out[-1]
    r = x
    if with_residual:
        r = (x.double() + residual.double()).to(dtype)  # exact sum, one rounding
        assert same_bits(out[2], r)
    assert normed.dtype == dtype
    assert_norm(normed, r, weight)
    same_quantized((q, s), reference.act_quant(normed, 128, True))


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_scales(backend, device, poison, group, ue8m0):
    x, weight = operands(9, 576, torch.bfloat16, device)
    q, s, normed = backend.rms_norm_quant(x, weight, EPS, None, group, ue8m0, normed=True)
    same_quantized((q, s), reference.act_quant(normed, group, ue8m0))
    same_quantized(backend.rms_norm_quant(x, weight, EPS, None, group, ue8m0), (q, s))


@BACKENDS
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_layouts_and_floor(backend, device, poison, layout):
    x, weight = operands(37, 700, torch.bfloat16, device)
    x[3] = 0
    q, s, normed = backend.rms_norm_quant(
        x, weight, EPS, ue8m0=True, floor=94, layout=layout, normed=True
    )
    wanted = reference.act_quant(normed, 128, True, 94, layout)
    assert s.stride() == wanted[1].stride()
    same_quantized((q, s), wanted)
    if layout == "row_major":
        assert (s[3] == 94).all()


@BACKENDS
@pytest.mark.parametrize("odd", [golden.NAN, golden.INF])
def test_nan_and_inf_are_seen(backend, device, odd):
    x, weight = operands(4, 300, torch.bfloat16, device)
    clean = backend.rms_norm_quant(x, weight, EPS, ue8m0=True)
    x[2, 140] = odd
    q, s, normed = backend.rms_norm_quant(x, weight, EPS, ue8m0=True, normed=True)
    same_quantized((q, s), reference.act_quant(normed, 128, True))
    assert s[2, 1] == 255
    keep = [0, 1, 3]
    same_quantized((q[keep], s[keep]), (clean[0][keep], clean[1][keep]))


@pytest.mark.parametrize("K", [512, 1536, 7168])
def test_rows_do_not_depend_on_the_batch(device, K):
    x, weight = operands(21, K, torch.bfloat16, device)
    residual = operands(21, K, torch.bfloat16, device)[0]
    whole = portable.rms_norm_quant(x, weight, EPS, residual, ue8m0=True)
    for row in (0, 13, 20):
        kept = slice(row, row + 1)
        alone = portable.rms_norm_quant(x[kept], weight, EPS, residual[kept], ue8m0=True)
        for got, wanted in zip(alone, whole, strict=True):
            assert same_bits(got, wanted[kept])


def test_strided_rows(device, poison):
    wide, weight = (
        operands(6, 900, torch.bfloat16, device)[0],
        operands(1, 300, torch.bfloat16, device)[1],
    )
    x, residual = wide[:, :300], wide[:, 400:700]
    got = portable.rms_norm_quant(x, weight, EPS, residual, ue8m0=True)
    wanted = portable.rms_norm_quant(x.contiguous(), weight, EPS, residual.contiguous(), ue8m0=True)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    assert got[2].is_contiguous()


@BACKENDS
def test_empty(backend, device):
    x, weight = torch.zeros(0, 300, device=device), torch.ones(300, device=device)
    q, s, total = backend.rms_norm_quant(x, weight, EPS, x, ue8m0=True)
    assert q.shape == (0, 300) and s.shape == (0, 3) and total.shape == (0, 300)


@BACKENDS
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unquantized(backend, device, poison, dtype, with_residual):
    x, weight = operands(7, 300, dtype, device)
    residual = operands(7, 300, dtype, device)[0] if with_residual else None
    *total, normed = backend.rms_norm_quant(x, weight, EPS, residual, normed=True)[2:]
    out = backend.add_rms_norm(x, weight, EPS, residual)
    assert all(same_bits(a, b) for a, b in zip(out, [normed, *total], strict=True))
    assert [t.shape for t in backend.add_rms_norm(x[:0], weight, EPS, x[:0])] == [(0, 300)] * 2
