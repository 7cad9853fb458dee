"""float32 -> e4m3 on every path, around every code and every midpoint."""

import golden
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checks import same_bits

from vllm_ue8m0.kernels.ue8m0 import encode_e4m3, encode_e4m3_sm89, expand


@triton.jit
def _encode_kernel(x, out, n, SM89: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=0.0)
    codes = encode_e4m3_sm89(values) if SM89 else encode_e4m3(values)
    tl.store(out + i, codes, mask=i < n)


@pytest.mark.parametrize("path", ["native", "sm_89"])
def test_rounds_once(device, path):
    if path == "sm_89" and device == "cpu":
        pytest.skip("PTX")
    codes = golden.E4M3[:127]
    exact = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [448.0, 464.0, 480.0, 1e30]])
    bits = exact.astype(np.float32).view(np.int32)
    # A neighbour of a midpoint becomes the midpoint in fp16: rounding twice shows.
    near = (bits[:, None] + np.arange(-3, 4)).clip(min=0).astype(np.int32).view(np.float32)
    values = np.concatenate([near.ravel(), [np.inf, np.nan, 2.0**-149]]).astype(np.float32)
    values = np.concatenate([values, -values])
    x = torch.from_numpy(values).to(device)
    out = torch.full(x.shape, 0x55, dtype=torch.uint8, device=device)
    _encode_kernel[(triton.cdiv(x.numel(), 512),)](x, out, x.numel(), path == "sm_89", 512)
    wanted = golden.e4m3_encode(values.astype(np.float64))
    got = out.cpu().numpy()
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], wanted[~nan])
    assert (got[nan] & 0x7F == 0x7F).all()


@triton.jit
def _expand_kernel(codes, out):
    i = tl.arange(0, 256)
    tl.store(out + i, expand(tl.load(codes + i)))


def test_codes_are_expanded_exactly(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=torch.float16, device=device)
    _expand_kernel[(1,)](codes, out)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.float16)
    assert same_bits(out, wanted)
