"""Device helpers: UE8M0 scales, e4m3 codes and roundings, each defined once for every kernel.

quant_exponent     float32 amax bits -> byte of the smallest 2^k with amax / 2^k <= 448
decode             scale bytes -> float32, all 256 codes exactly (0 -> 2^-127, 255 -> NaN)
split              scale bytes -> two factors of about half the exponent each
quantize           float32 [ROWS, GROUP] -> e4m3 code bytes, one scale per row
divide             float32 [ROWS, GROUP] / [ROWS], correctly rounded
to_float, expand, encode_e4m3, round_to, dot     conversions and the tile product
dot_scaled         the tile product with scales, in the tensor cores of sm_100

Triton's interpreter holds bf16 and e4m3 as raw integers (triton-lang/triton#4972): its tl.dot
multiplies bf16 bit patterns, its conversions to bf16 and e4m3 do not round to nearest even, and
it reads e4m3's NaN as 480. GPUs before sm_89 have no e4m3 in Triton at all. The last line's helpers
therefore go through integer arithmetic there, and are the native instruction elsewhere.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
E4M3_NAN = tl.constexpr(0x7F)
SF_NAN = tl.constexpr(255)


@triton.jit
def quant_exponent(amax_bits, FLOOR: tl.constexpr):
    """Bits of a non-negative float32 -> int32 byte, at least FLOOR; Inf and NaN give 255.

    448 = 1.75 * 2^8: adding 0x1FFFFF carries into the exponent exactly when the mantissa exceeds
    0x600000, so no division and no logarithm is rounded on the way.
    """
    code = tl.maximum(((amax_bits + 0x1FFFFF) >> 23) - 8, FLOOR)
    return tl.where(amax_bits >= 0x7F800000, SF_NAN, code)


@triton.jit
def decode(scale):
    """uint8 scale bytes -> float32, exact; float32 scales pass through."""
    if scale.dtype == tl.uint8:
        code = scale.to(tl.int32)
        bits = tl.where(code == 0, 0x400000, code << 23)  # 2^-127 is a float32 subnormal
        scale = tl.where(code == SF_NAN, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def split(code):
    """Scale bytes -> (low, high), low * high = 2^(code - 127), exponents at most one apart.

    The product of two scales has exponents in [-254, 254], beyond float32, where a product of
    codes times both scales may well be representable. With x and y split, low_x * high_y and
    high_x * low_y stay within 2^+-127 and have exponents of one sign, so multiplying by one and
    then by the other leaves float32's normal range only if the result does. 255 -> low is NaN.
    """
    exponent = code.to(tl.int32) - 127
    half = exponent >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 128, float("nan"), low), high


@triton.jit
def to_float(x):
    """Any float element type, or e4m3 codes in uint8 -> float32, exact."""
    if x.dtype == tl.uint8 or x.dtype == tl.float8e4nv:
        if INTERPRET or not cuda_capability_geq(8, 9):
            code = x.to(tl.uint8, bitcast=True).to(tl.int32)
            # Exponent and mantissa moved up are a float32 with an exponent 120 too small.
            value = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
            value = tl.where((code & 0x7F) == E4M3_NAN, float("nan"), value)
            return tl.where(code >= 0x80, -value, value)
        else:
            return x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif INTERPRET and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def encode_e4m3(x):
    """float32 -> e4m3 code bytes: nearest even, saturating at 448; NaN -> 0x7F."""
    if INTERPRET or not cuda_capability_geq(8, 9):
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9, the spacing of float32 at 2^14.
        subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
        code = code | ((bits >> 24) & 0x80)
        return tl.where(magnitude > 0x7F800000, E4M3_NAN, code).to(tl.uint8)
    elif cuda_capability_geq(9, 0):
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return encode_e4m3_sm89(x)


@triton.jit
def encode_e4m3_sm89(x):
    """encode_e4m3 for sm_89, where Triton 3.6 rounds twice, by way of fp16 (3.9 does not)."""
    return tl.inline_asm_elementwise(
        """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> dtype, nearest even."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
            return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def expand(codes):
    """e4m3 codes in uint8 -> fp16, exact; NaN stays NaN."""
    code = codes.to(tl.int16)
    # Exponent and mantissa moved up are an fp16 with an exponent 8 too small.
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == E4M3_NAN, float("nan"), value).to(tl.float16)


@triton.jit
def dot(a, w):
    """a [M, K] times e4m3 w [K, N] -> float32 [M, N]; e4m3 is exact in every type of a.

    Codes are e4m3, or uint8 where Triton has no e4m3: before sm_89. Without an accumulator
    argument: Hopper's fp8 accumulator keeps about 14 bits, so the caller adds the product of one
    scale group at a time in float32.
    """
    if INTERPRET:
        return tl.dot(to_float(a), to_float(w), input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        return tl.dot(a, w)
    elif a.dtype == tl.uint8:
        return tl.dot(expand(a), expand(w))
    elif w.dtype == tl.uint8:
        return tl.dot(a, to_float(w).to(a.dtype), input_precision="ieee")
    else:
        # By way of float32: Triton 3.6's direct e4m3 -> bf16 does not assemble for sm_89.
        return tl.dot(a, w.to(tl.float32).to(a.dtype), input_precision="ieee")


@triton.jit
def _for_groups(scale, ROWS: tl.constexpr, K: tl.constexpr):
    """Bytes [ROWS] or one byte -> [ROWS, K / 32]: the tensor cores have one for every 32 codes."""
    if scale.type.is_block():
        scale = scale[:, None]
    return tl.broadcast_to(scale, (ROWS, K // 32))


@triton.jit
def dot_scaled(x, x_scale, y, y_scale, acc):
    """acc + x [R, K] * 2^(x_scale - 127) times y [K, C] * 2^(y_scale - 127), float32 [R, C].

    e4m3 codes of one scale group along K, a multiple of 32; scale bytes [R] and [C], or one byte.
    On sm_100, for 128 rows of x, this is one kind of instruction, which scales and adds to acc.
    """
    x_scale = _for_groups(x_scale, x.shape[0], x.shape[1])
    y_scale = _for_groups(y_scale, y.shape[1], y.shape[0])
    return tl.dot_scaled(x, x_scale, "e4m3", y, y_scale, "e4m3", acc)


@triton.jit
def divide(x, scale):
    """float32 x [ROWS, GROUP] / scale [ROWS], correctly rounded for scales of at least 2^-60.

    One division a row; then x times the reciprocal and two corrections with exact remainders: the
    first brings the quotient within one ulp, the second rounds it correctly (Markstein). These are
    5 instructions an element, where an IEEE division takes about 10 and a branch.
    """
    scale = scale[:, None]
    if INTERPRET:  # whose fma rounds twice
        return tl.math.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        inverse, negated = tl.math.div_rn(1.0, scale), tl.math.div_rn(-1.0, scale)
        # Inf: the quotient x * 0 stands, and 0 keeps the remainders finite.
        scale = tl.where(scale == float("inf"), 0.0, scale)
        quotient = x * inverse
        # Remainders quotient * scale - x are +0 where they vanish; +0 * negated is -0, which keeps
        # the sign of a quotient -0. Triton's unary minus is 0 - x and would not.
        quotient = tl.fma(tl.fma(quotient, scale, -x), negated, quotient)
        return tl.fma(tl.fma(quotient, scale, -x), negated, quotient)


@triton.jit
def quantize(x, UE8M0: tl.constexpr, FLOOR: tl.constexpr):
    """float32 x [ROWS, GROUP] -> (code bytes [ROWS, GROUP], scales [ROWS]).

    UE8M0: bytes, and x times an exact power of two is rounded once. Otherwise float32
    max(amax, 1e-4) / 448 and codes of x / scale, both divisions correctly rounded.
    """
    # The order of the bits is the order of the magnitudes, with NaN above Inf, which a float
    # maximum would drop.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if UE8M0:
        sf = quant_exponent(amax, FLOOR)
        inverse = ((254 - sf) << 23).to(tl.float32, bitcast=True)  # 2^(127 - sf), sf <= 247
        inverse = tl.where(sf == SF_NAN, float("nan"), inverse)
        return encode_e4m3(x * inverse[:, None]), sf.to(tl.uint8)
    else:
        amax = tl.maximum(amax, 0x38D1B717).to(tl.float32, bitcast=True)  # float32(1e-4)
        scale = tl.math.div_rn(amax, 448.0)
        return encode_e4m3(divide(x, scale)), scale
