"""weight_dequant: every code, every scale byte, every rounding, bit for bit."""

import golden
import numpy as np
import pytest
import torch
from checks import random_codes, random_scale, same_bits

from vllm_ue8m0 import portable, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
E4M3 = torch.float8_e4m3fn


@BACKENDS
def test_every_code(backend, device):
    w = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).view(2, 128)
    one = torch.full((1, 1), 127, dtype=torch.uint8, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = backend.weight_dequant(w, one, (128, 128), None, dtype)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out.double().cpu().numpy().ravel(), golden.E4M3)


@BACKENDS
def test_every_scale_byte(backend, device):
    """All 256 decode exactly, the subnormal 2^-127 and the NaN among them."""
    w = torch.full((256, 32), 0x38, dtype=torch.uint8, device=device).view(E4M3)  # 1.0
    sf = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    out = backend.weight_dequant(w, sf, (1, 32), None, torch.float32)
    wanted = np.broadcast_to(golden.UE8M0[:, None], (256, 32))
    np.testing.assert_array_equal(out.double().cpu().numpy(), wanted)


@BACKENDS
def test_e4m3_times_a_power_of_two_is_exact_in_bf16(backend, device):
    w = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).repeat(8, 1)
    sf = torch.tensor([[20], [100], [127], [200]], dtype=torch.uint8, device=device)
    out = backend.weight_dequant(w, sf, (2, 256), None, torch.bfloat16)
    wanted = golden.dequantize(w, sf, (2, 256))
    np.testing.assert_array_equal(out.double().cpu().numpy(), wanted)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("N", "K", "gran"), [(576, 300, (128, 128)), (70, 192, (128, 64)), (37, 70, (5, 32))]
)
def test_rounds_once(backend, device, N, K, gran, scale_dtype, with_c, dtype):
    w = random_codes(N, K, device=device)
    shape = -(-N // gran[0]), -(-K // gran[1])
    sf = random_scale(*shape, dtype=scale_dtype, device=device)
    c = torch.rand(shape[0], device=device) + 0.5 if with_c else None
    out = backend.weight_dequant(w, sf, gran, c, dtype)
    # float32 arithmetic of numpy: (code * scale) * c, then one rounding.
    values = golden.E4M3[w.view(torch.uint8).cpu().numpy()].astype(np.float32)
    full = np.repeat(np.repeat(golden.scale_values(sf), gran[0], 0), gran[1], 1)[:N, :K]
    values = values * full.astype(np.float32)
    if with_c:
        values = values * np.repeat(c.cpu().numpy(), gran[0])[:N, None]
    assert same_bits(out, torch.from_numpy(values).to(dtype).to(device))


@BACKENDS
def test_leading_dimension_and_strides(backend, device):
    w = random_codes(3, 70, 256, device=device)[:, :, :192]
    sf = random_scale(3, 5, 2, dtype=torch.uint8, device=device)
    c = torch.rand(3, 5, device=device)
    out = backend.weight_dequant(w, sf, [16, 128], c, torch.float32)
    assert out.shape == (3, 70, 192)
    for e in range(3):
        assert same_bits(
            out[e], backend.weight_dequant(w[e].contiguous(), sf[e], (16, 128), c[e], torch.float32)
        )


@BACKENDS
def test_empty(backend, device):
    w, sf = torch.zeros(0, 128, device=device).to(E4M3), torch.zeros(0, 1, device=device)
    assert backend.weight_dequant(w, sf).shape == (0, 128)
