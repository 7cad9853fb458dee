"""The format from its definition, in exact arithmetic: no code of the package is used here.

e4m3: sign, 4 exponent bits of bias 7, 3 mantissa bits; 0x7F is NaN, there is no infinity.
UE8M0: 2^(byte - 127), 255 is NaN.
float64 holds every float32 exactly, and so the comparisons below are exact too.
"""

from fractions import Fraction

import numpy as np
import torch

INF, NAN = float("inf"), float("nan")

# (amax, byte), by hand: the smallest k with amax <= 448 * 2^k, plus 127; at least 105.
ACT_QUANT_BYTES = [
    (448.0, 127),  # k = 0 exactly
    (450.0, 128),  # the next bfloat16
    (446.0, 127),
    (224.0, 126),
    (225.0, 127),
    (896.0, 128),
    (1.0, 119),  # 448 * 2^-8 = 1.75 holds 1, 448 * 2^-9 = 0.875 does not
    (1.75, 119),
    (1.7578125, 120),
    (0.875, 118),
    (2.0**-126, 105),
    (1e-4, 105),  # 448 * 2^-22 = 1.068e-4
    (448 * 2.0**-22, 105),
    (449 * 2.0**-22, 106),
    (0.0, 105),
    (2.0**-133, 105),  # a subnormal
    (3.3895313892515355e38, 247),  # the largest bfloat16, 255 * 2^120 <= 448 * 2^120
    (INF, 255),
    (NAN, 255),
]


def e4m3_value(code: int) -> float:
    if code & 0x7F == 0x7F:
        return NAN
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 0:
        magnitude = Fraction(mantissa, 8) * Fraction(2) ** -6
    else:
        magnitude = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    return -float(magnitude) if sign else float(magnitude)  # 0x80 is -0.0


E4M3 = np.array([e4m3_value(code) for code in range(256)])
_MIDPOINTS = (E4M3[:126] + E4M3[1:127]) / 2  # between neighbours of codes 0 .. 126


def e4m3_encode(x: np.ndarray) -> np.ndarray:
    """Codes nearest to float64 x, ties to even, saturating; NaN -> 0x7F; -0.0 keeps its sign."""
    magnitude = np.abs(x)
    lower = np.searchsorted(_MIDPOINTS, magnitude, side="left")  # a midpoint goes down
    upper = np.searchsorted(_MIDPOINTS, magnitude, side="right")  # a midpoint goes up
    code = np.where(lower % 2 == 0, lower, upper) | np.signbit(x) * 0x80
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def ue8m0_value(byte: int) -> float:
    return NAN if byte == 255 else float(Fraction(2) ** (byte - 127))


UE8M0 = np.array([ue8m0_value(byte) for byte in range(256)])


def ceil_log2(x: Fraction) -> int:
    """The smallest k with x <= 2^k."""
    k = x.numerator.bit_length() - x.denominator.bit_length() - 1
    while x > Fraction(2) ** k:
        k += 1
    return k


def quant_byte(amax: float, floor: int = 105) -> int:
    """Byte of the smallest 2^k with amax <= 448 * 2^k, at least floor; Inf and NaN: 255."""
    if amax != amax or amax == INF:
        return 255
    return floor if amax == 0 else max(ceil_log2(Fraction(amax) / 448) + 127, floor)


def act_quant_ue8m0(x: torch.Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of x [M, K]."""
    values = x.to(torch.float64).cpu().numpy()
    codes, bytes_ = np.zeros(values.shape, np.uint8), []
    for start in range(0, values.shape[1], group):
        block = values[:, start : start + group]
        magnitude = np.abs(block)
        amax = np.where(np.isnan(magnitude).any(1), NAN, np.nan_to_num(magnitude, nan=NAN).max(1))
        amax = np.where(np.isinf(magnitude).any(1) & ~np.isnan(amax), INF, amax)
        sf = np.array([quant_byte(float(a)) for a in amax])
        with np.errstate(invalid="ignore"):
            codes[:, start : start + group] = e4m3_encode(block / UE8M0[sf][:, None])
        bytes_.append(sf)
    return codes, np.stack(bytes_, 1).astype(np.uint8)


def act_quant_float(x: torch.Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and float32 scales max(amax, 1e-4) / 448 of x [M, K], in numpy's IEEE float32."""
    values = x.to(torch.float32).cpu().numpy()
    codes, scales = np.zeros(values.shape, np.uint8), []
    for start in range(0, values.shape[1], group):
        block = values[:, start : start + group]
        with np.errstate(invalid="ignore"):
            scale = np.maximum(np.abs(block).max(1), np.float32(1e-4)) / np.float32(448)
            codes[:, start : start + group] = e4m3_encode(
                (block / scale[:, None]).astype(np.float64)
            )
        scales.append(scale)
    return codes, np.stack(scales, 1)


def scale_values(scale: torch.Tensor) -> np.ndarray:
    """float64 values of uint8, e8m0 or float32 scales."""
    if scale.dtype == torch.float32:
        return scale.to(torch.float64).cpu().numpy()
    return UE8M0[scale.view(torch.uint8).cpu().numpy()]


def dequantize(codes: torch.Tensor, scale: torch.Tensor, gran: tuple[int, int]) -> np.ndarray:
    """float64 values of e4m3 codes [N, K] with one scale per gran rectangle."""
    full = np.repeat(np.repeat(scale_values(scale), gran[0], 0), gran[1], 1)
    values = E4M3[codes.view(torch.uint8).cpu().numpy()]
    return values * full[: values.shape[0], : values.shape[1]]
