"""weight_quant, bit for bit, against exact arithmetic."""

from fractions import Fraction

import golden
import numpy as np
import pytest
import torch
from checks import same_quantized

from vllm_ue8m0 import portable, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TINY = np.float32(2.0**-126)


def exact(w, ue8m0):
    """Codes and scales of w [N, K], a block at a time."""
    values = w.double().cpu().numpy()
    (N, K), grid = w.shape, (-(-w.shape[0] // 128), -(-w.shape[1] // 128))
    codes = np.zeros((N, K), np.uint8)
    scales = np.zeros(grid, np.uint8 if ue8m0 else np.float32)
    for i, j in np.ndindex(grid):
        place = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
        amax = np.abs(values[place]).max()
        if ue8m0:
            scales[i, j] = golden.quant_byte(float(amax), 1)
            scaled = values[place] / golden.UE8M0[scales[i, j]]
        else:
            scales[i, j] = 1 if amax == 0 else max(np.float32(amax) / np.float32(448), TINY)
            scaled = (values[place].astype(np.float32) / scales[i, j]).astype(np.float64)
        codes[place] = golden.e4m3_encode(scaled)
    return codes, scales


def check(backend, w, ue8m0):
    q, s = backend.weight_quant(w, ue8m0)
    codes, scales = exact(w, ue8m0)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and s.is_contiguous()
    np.testing.assert_array_equal(s.cpu().numpy(), scales)
    np.testing.assert_array_equal(q.view(torch.uint8).cpu().numpy(), codes)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize(("N", "K"), [(128, 128), (300, 200), (1, 1), (129, 640)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random(backend, device, poison, dtype, N, K, ue8m0):
    w = torch.randn(N, K, device=device) * torch.randn(N, 1, device=device).mul(2).exp() * 0.02
    check(backend, w.to(dtype), ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -118, -117, -80, -60, -50, 0, 100, 119])
def test_any_magnitude(backend, device, exponent, ue8m0):
    w = torch.randn(130, 130, dtype=torch.float64, device=device).clamp(-3, 3)
    check(backend, (w * 2.0**exponent).float(), ue8m0)


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
def test_zero_blocks_and_signed_zeros(backend, device, ue8m0):
    w = torch.zeros(256, 128, device=device)
    w[128:, ::2] = -0.0
    w[200, 5] = -3.0
    check(backend, w, ue8m0)
    assert backend.weight_quant(w, ue8m0)[1][0, 0] == 1


@BACKENDS
def test_scale_is_the_smallest_that_holds_the_block(backend, device):
    amax = torch.tensor([448.0, 448.0000305, 447.99997, 1e-4, 3e38])
    w = torch.zeros(5 * 128, 128, device=device)
    w[::128, 7] = amax.to(device)
    s = backend.weight_quant(w)[1].flatten().tolist()
    for value, byte in zip(amax.tolist(), s, strict=True):
        scale = Fraction(2) ** (byte - 127)
        assert scale / 2 * 448 < Fraction(value) <= scale * 448


@BACKENDS
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("odd", [golden.NAN, golden.INF, -golden.INF])
def test_nan_and_inf_are_refused(backend, device, odd, ue8m0):
    w = torch.randn(200, 200, device=device).bfloat16()
    w[150, 30] = odd
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        backend.weight_quant(w, ue8m0)


def test_strides_and_empty(device, poison):
    wide = torch.randn(200, 700, device=device).bfloat16()
    same_quantized(
        portable.weight_quant(wide[:, 100:400]), reference.weight_quant(wide[:, 100:400])
    )
    same_quantized(portable.weight_quant(wide.t()), reference.weight_quant(wide.t()))
    assert portable.weight_quant(wide[:0])[0].shape == (0, 700)
