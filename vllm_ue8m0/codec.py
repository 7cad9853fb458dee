"""UE8M0 <-> float32 in torch, by integer arithmetic on the bits, and the classes of scales.

encode   byte = ceil(log2(scale)) + 127. ceil(log2 x) in floating point is not that rule: one ulp
         above 2^k it rounds down for 245 of the 253 exponents.
decode   2^(byte - 127) exactly for 0..254 (byte 0 is the float32 subnormal 2^-127), 255 -> NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from .formats import SF_MAX, SF_MIN, SF_NAN

_MANTISSA = 0x7FFFFF
_QUIET_NAN = 0x7FC00000


def convert_scale_to_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Round scales up to powers of two: uint8 = ceil(log2(scale)) + 127, any shape.

    0 and everything up to 2^-127 give code 0. What has no code gives 255, the NaN of the format:
    NaN, Inf, negative values, values above 2^127. Rounding a weight's scale without quantizing
    the weight again changes the weight; see `exact_ue8m0` for the conversion that cannot.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & _MANTISSA
    normal = exponent + (mantissa != 0).to(torch.int32)
    subnormal = (mantissa > 0x400000).to(torch.int32)  # 2^-127 is the subnormal 0x400000
    code = torch.where(exponent == 0, subnormal, normal.clamp(max=SF_NAN))
    code = torch.where((bits < 0) & (bits & 0x7FFFFFFF != 0), SF_NAN, code)
    return code.to(torch.uint8)


def convert_scale_from_ue8m0(sf: torch.Tensor) -> torch.Tensor:
    """Decode uint8 or float8_e8m0fnu scale bytes to float32, all 256 codes; exact."""
    code = sf.view(torch.uint8).to(torch.int32)
    bits = torch.where(code == 0, 0x400000, code << 23)
    return torch.where(code == SF_NAN, _QUIET_NAN, bits).view(torch.float32)


def scale_to_float(scale: torch.Tensor) -> torch.Tensor:
    """Any stored scale as float32, by value: uint8 and e8m0 are decoded, floats are widened."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return convert_scale_from_ue8m0(scale)
    if scale.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return scale.to(torch.float32)
    raise ValueError(
        f"scale dtype {scale.dtype} is not supported; "
        "allowed: uint8, float8_e8m0fnu, float32, bfloat16, float16"
    )


class ScaleClass(Enum):
    """What a set of weight scales is, decided from their bits."""

    POW2 = "pow2"  # every scale is 2^k
    FACTORED = "factored"  # every scale is c * 2^k with one c
    ARBITRARY = "arbitrary"  # anything else, or exponents that have no byte in [1, 254]


@dataclass(frozen=True)
class ExactScale:
    """Scales as bytes and one factor, with scale == c * 2^(sf - 127) for every entry."""

    kind: ScaleClass
    sf: torch.Tensor | None  # uint8 in [1, 254], None if ARBITRARY
    c: float  # 1.0 for POW2, in [1, 2) otherwise


def exact_ue8m0(scale: torch.Tensor, valid: torch.Tensor | None = None) -> ExactScale:
    """Factor positive finite float32 scales into bytes and one c, or say that it cannot be done.

    The only way from float scales to bytes on the weight path: it proves exactness first. Where
    `valid` (same shape, bool) is False the entry is free (its weights are all zero): byte 1.
    """
    flat = scale.reshape(1, -1)
    sf, c, exact = factor_scales(flat, None if valid is None else valid.reshape(1, -1))
    if not bool(exact):
        return ExactScale(ScaleClass.ARBITRARY, None, 1.0)
    factor = float(c)
    kind = ScaleClass.POW2 if factor == 1.0 else ScaleClass.FACTORED
    return ExactScale(kind, sf.reshape(scale.shape), factor)


def factor_scales(
    scale: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`exact_ue8m0` of each row of scale [S, n] at once -> sf [S, n] uint8, c [S], exact [S] bool.

    A row is exact when all its mantissas are equal and every exponent is a byte in [1, 254].
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & _MANTISSA
    used = torch.ones_like(bits, dtype=torch.bool) if valid is None else valid
    largest = torch.where(used, mantissa, -1).amax(-1)
    smallest = torch.where(used, mantissa, _MANTISSA + 1).amin(-1)
    in_range = (((exponent >= SF_MIN) & (exponent <= SF_MAX)) | ~used).all(-1)
    empty = largest < 0  # nothing but all-zero blocks
    exact = ((largest == smallest) & in_range) | empty
    c = torch.where(empty, 0, largest).bitwise_or(0x3F800000).to(torch.int32).view(torch.float32)
    return torch.where(used, exponent, SF_MIN).to(torch.uint8), c, exact


def quant_exponent(amax: torch.Tensor, floor: int) -> torch.Tensor:
    """Byte of the smallest 2^k with amax / 2^k <= 448, for non-negative float32 amax; int32.

    448 = 1.75 * 2^8, so one comparison of the mantissa decides: adding 0x1FFFFF carries into the
    exponent exactly when the mantissa exceeds 0x600000. Checked over every bf16 amax and over
    float32 around every 448 * 2^k against rational arithmetic (tests/test_codec.py).
    Inf and NaN give 255; the result is not below `floor` otherwise.
    """
    bits = amax.contiguous().view(torch.int32)
    code = (((bits + 0x1FFFFF) >> 23) - 8).clamp(min=floor)
    return torch.where(bits >= 0x7F800000, SF_NAN, code)
