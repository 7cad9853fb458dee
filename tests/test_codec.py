"""UE8M0 codes against rational arithmetic, and the documented outcome of every odd input."""

from fractions import Fraction

import golden
import numpy as np
import pytest
import torch

from vllm_ue8m0.codec import (
    ScaleClass,
    convert_scale_from_ue8m0,
    convert_scale_to_ue8m0,
    exact_ue8m0,
    factor_scales,
    quant_exponent,
    scale_to_float,
)

SPECIAL_CODES = [
    (0.0, 0),
    (-0.0, 0),
    (2.0**-149, 0),  # the smallest float32
    (2.0**-127, 0),
    (2.0**-127 + 2.0**-149, 1),
    (2.0**-126, 1),
    (1.0, 127),
    (1.0 + 2.0**-23, 128),
    (2.0**127, 254),
    (2.0**127 * (1 + 2.0**-23), 255),  # no code above 2^127
    (golden.INF, 255),
    (-golden.INF, 255),
    (golden.NAN, 255),
    (-1.0, 255),
    (-(2.0**-149), 255),
]


def neighbors(value: float, ulps: int) -> list[float]:
    """The float32 values within `ulps` steps of a positive one."""
    bits = int(np.float32(value).view(np.int32))
    near = np.arange(max(bits - ulps, 1), min(bits + ulps, 0x7F7FFFFF) + 1, dtype=np.int32)
    return near.view(np.float32).astype(float).tolist()


@pytest.mark.parametrize(("value", "code"), SPECIAL_CODES)
def test_encode_special(value, code):
    assert convert_scale_to_ue8m0(torch.tensor([value])).tolist() == [code]


def test_encode_every_exponent_and_its_neighbors():
    values = [v for k in range(-149, 128) for v in neighbors(2.0**k, 8)]
    wanted = [min(max(golden.ceil_log2(Fraction(v)) + 127, 0), 255) for v in values]
    assert convert_scale_to_ue8m0(torch.tensor(values)).tolist() == wanted


def test_encode_takes_any_shape_stride_and_float_dtype():
    scale = torch.tensor([[1.0, 3.0], [0.25, 1024.0]])
    codes = torch.tensor([[127, 129], [125, 137]], dtype=torch.uint8)
    assert torch.equal(convert_scale_to_ue8m0(scale), codes)
    assert torch.equal(convert_scale_to_ue8m0(scale.t()), codes.t())
    assert torch.equal(convert_scale_to_ue8m0(scale.bfloat16()), codes)
    assert convert_scale_to_ue8m0(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_decode_every_code(dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    decoded = convert_scale_from_ue8m0(codes.view(dtype))
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.double().cpu().numpy(), golden.UE8M0)
    assert torch.equal(convert_scale_to_ue8m0(decoded), codes)


def test_scale_to_float():
    assert scale_to_float(torch.tensor([128], dtype=torch.uint8)).item() == 2.0
    byte = torch.tensor([128], dtype=torch.uint8)
    assert scale_to_float(byte.view(torch.float8_e8m0fnu)).item() == 2.0
    assert scale_to_float(torch.tensor([1.5], dtype=torch.bfloat16)).item() == 1.5
    with pytest.raises(ValueError, match=r"int32 is not supported; allowed: uint8"):
        scale_to_float(torch.tensor([1], dtype=torch.int32))


@pytest.mark.parametrize(("amax", "byte"), golden.ACT_QUANT_BYTES)
def test_quant_exponent_golden(amax, byte):
    assert quant_exponent(torch.tensor([amax]), 105).tolist() == [byte]
    assert golden.quant_byte(amax) == byte


@pytest.mark.parametrize("floor", [0, 85, 94, 105])
def test_quant_exponent_every_bfloat16(floor, device):
    amax = torch.arange(0x7F80, dtype=torch.int16, device=device).view(torch.bfloat16).float()
    assert amax.numel() == 32640
    wanted = [golden.quant_byte(a, floor) for a in amax.tolist()]
    assert quant_exponent(amax, floor).tolist() == wanted


def test_quant_exponent_float32_around_every_boundary(device):
    values = [v for k in range(-149, 119) for v in neighbors(448 * 2.0**k, 8)]
    values += neighbors(float(np.finfo(np.float32).max), 8)
    wanted = [golden.quant_byte(v, 0) for v in values]
    assert quant_exponent(torch.tensor(values, device=device), 0).tolist() == wanted


def test_exact_classifies():
    pow2 = exact_ue8m0(torch.tensor([[1.0, 0.25], [2.0**-126, 2.0**127]]))
    assert (pow2.kind, pow2.c) == (ScaleClass.POW2, 1.0)
    assert pow2.sf.tolist() == [[127, 125], [1, 254]]
    factored = exact_ue8m0(torch.tensor([0.75, 3.0, 1.5]))
    assert (factored.kind, factored.c) == (ScaleClass.FACTORED, 1.5)
    assert factored.sf.tolist() == [126, 128, 127]


@pytest.mark.parametrize(
    "scales",
    [[1.0, 1.5], [1.0, 0.0], [1.0, 2.0**-127], [1.0, golden.INF], [1.0, golden.NAN], [1.0, -1.0]],
)
def test_exact_refuses(scales):
    result = exact_ue8m0(torch.tensor(scales))
    assert result.kind is ScaleClass.ARBITRARY
    assert result.sf is None


def test_exact_ignores_entries_that_are_not_valid():
    scale, valid = torch.tensor([0.0, 3.0, golden.NAN]), torch.tensor([False, True, False])
    result = exact_ue8m0(scale, valid)
    assert (result.kind, result.c, result.sf.tolist()) == (ScaleClass.FACTORED, 1.5, [1, 128, 1])
    nothing = exact_ue8m0(scale, torch.zeros(3, dtype=torch.bool))
    assert (nothing.kind, nothing.sf.tolist()) == (ScaleClass.POW2, [1, 1, 1])


def test_exact_reproduces_every_scale():
    exponent = torch.arange(-126, 128)
    scale = torch.ldexp(torch.full((254,), 1.0 + 2.0**-23), exponent)
    result = exact_ue8m0(scale)
    assert result.kind is ScaleClass.FACTORED
    assert torch.equal(convert_scale_from_ue8m0(result.sf) * result.c, scale)


def test_factor_scales_decides_each_row():
    scale = torch.tensor([[1.0, 4.0], [1.0, 1.5], [1.75, 3.5], [1.0, 0.0]])
    sf, c, exact = factor_scales(scale)
    assert exact.tolist() == [True, False, True, False]
    assert sf[[0, 2]].tolist() == [[127, 129], [127, 128]]
    assert c[[0, 2]].tolist() == [1.0, 1.75]
