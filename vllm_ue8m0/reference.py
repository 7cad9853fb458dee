"""Every operator in plain torch: the definition, the CPU backend, and the tests' oracle.

Shapes and layouts (all row-major):
  x [..., K] float            a [..., K] e4m3           a_s [..., ceil(K/gk)]
  w [..., N, K] e4m3          sf [..., ceil(N/gn), ceil(K/gk)] uint8 | e8m0 | float32
  c [..., ceil(N/gn)] float32, optional: a factor of the output rows of each scale row
gran = (gn, gk) is the granularity of a weight's scale grid, 128x128 unless a shard cuts a block;
activation groups are 1 x gk. The last group or block may be partial.

A product is the float32 matrix product of the dequantized operands, times c, plus bias, rounded
once. For power-of-two scales each dequantized operand is exact, so nothing but the order of the
float32 sum is left open.
"""

from __future__ import annotations

import torch

from .codec import convert_scale_from_ue8m0, quant_exponent, scale_to_float
from .formats import AMAX_FLOOR, FP8_MAX, SF_FLOOR, SF_MIN, SF_NAN
from .layouts import ceil_div, expand

E4M3 = torch.float8_e4m3fn
# Rows of a weight dequantized at a time: bounds the float32 copy to 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def act_quant(
    x: torch.Tensor, group: int = 128, ue8m0: bool = False, floor: int = SF_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of `group` along the last dimension; returns e4m3 codes and scales.

    ue8m0: scale byte = ceil(log2(amax / 448)) + 127, at least `floor`; codes are rounded once,
    with the rounded scale. Otherwise float32 scales max(amax, 1e-4) / 448, codes of x / scale,
    as in DeepSeek-V3's inference/kernel.py. A group with Inf or NaN shows it: byte 255 (or a
    non-finite scale) and NaN codes.
    """
    K = x.shape[-1]
    groups = ceil_div(K, group)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, groups * group - K))
    blocks = padded.unflatten(-1, (groups, group))
    amax = blocks.abs().amax(-1)
    if ue8m0:
        code = quant_exponent(amax, floor)
        inverse = ((254 - code) << 23).view(torch.float32)
        inverse = torch.where(code == SF_NAN, torch.nan, inverse)
        scaled, scale = blocks * inverse[..., None], code.to(torch.uint8)
    else:
        scale = _divide_by_fp8_max(amax.clamp(min=AMAX_FLOOR))
        scaled = blocks / scale[..., None]
    q = scaled.to(E4M3)
    q = torch.where(scaled.isnan(), torch.full_like(q, torch.nan), q)
    return q.flatten(-2)[..., :K].contiguous(), scale


def _divide_by_fp8_max(amax: torch.Tensor) -> torch.Tensor:
    """amax / 448, correctly rounded: by a Python number, CUDA multiplies with the reciprocal."""
    return amax / torch.full_like(amax, FP8_MAX)


def dequantize(
    w: torch.Tensor, sf: torch.Tensor, gran: tuple[int, int], c: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 values of a weight [..., N, K], or of activations with gran = (1, gk)."""
    rows, columns = w.shape[-2:]
    values = e4m3_to_float(w)
    values *= expand(scale_to_float(sf), rows, columns, gran)
    if c is not None:
        values *= c.repeat_interleave(gran[0], dim=-1)[..., :rows, None]
    return values


def e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 -> float32, exact. On the CPU 4x faster than torch's conversion (0.2 GB/s).

    The code's bits, moved up, are a float16 with an exponent 8 too small; NaN is restored after.
    """
    if codes.device.type != "cpu" or codes.numel() < 4096:
        return codes.to(torch.float32)
    bits = codes.view(torch.int8).to(torch.int16)  # sign-extended
    nan = (bits & 0x7F) == 0x7F
    half = bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16)
    values = half.to(torch.float32).mul_(256.0)
    return values.masked_fill_(nan, torch.nan) if bool(nan.any()) else values


def weight_dequant(
    w: torch.Tensor,
    sf: torch.Tensor,
    gran: tuple[int, int] = (128, 128),
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """w * scale (* c) in float32, rounded once to out_dtype."""
    return dequantize(w, sf, gran, c).to(out_dtype)


def fake_quant(x: torch.Tensor, group: int, activation_scale: str) -> torch.Tensor:
    """The float32 values that x keeps after quantization; "none" keeps x."""
    if activation_scale == "none":
        return x.to(torch.float32)
    q, scale = act_quant(x, group, activation_scale == "ue8m0")
    return dequantize_activations(q, scale, group)


def dequantize_activations(q: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """[..., K] e4m3 and [..., ceil(K/group)] scales of any dtype -> float32."""
    full = scale_to_float(scale).repeat_interleave(group, dim=-1)[..., : q.shape[-1]]
    return e4m3_to_float(q) * full


def matmul(
    a: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    gran: tuple[int, int],
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [M, K] float32 @ dequantized w [N, K]^T -> [M, N] float32, a few weight rows at a time."""
    N, K = w.shape
    rows = max(_CHUNK_ELEMENTS // max(K, 1) // gran[0], 1) * gran[0]
    out = torch.empty(a.shape[0], N, dtype=torch.float32, device=a.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        scales = sf[start // gran[0] : ceil_div(stop, gran[0])]
        torch.mm(a, dequantize(w[start:stop], scales, gran).t(), out=out[:, start:stop])
    if c is not None:
        out *= c.repeat_interleave(gran[0])[:N]
    if bias is not None:
        out += bias.to(torch.float32)
    return out


def gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Quantized a [M, K] with 1 x gk scales, times w [N, K]^T -> [M, N] out_dtype."""
    return matmul(dequantize_activations(a, a_s, gran[1]), w, sf, gran, c, bias).to(out_dtype)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    activation_scale: str,
) -> torch.Tensor:
    """Quantize x [M, K] as activation_scale says, times w^T -> [M, N] in x's dtype."""
    a = fake_quant(x, gran[1], activation_scale)
    return matmul(a, w, sf, gran, c, bias).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2 I]; both results are rounded to the input's dtype, as DeepSeek's
    `F.silu(w1(x)) * w3(x)` rounds them."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.to(torch.float32)).to(gate.dtype) * up


def experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gran13: tuple[int, int],
    gran2: tuple[int, int],
    activation_scale: str,
    weight_on_input: bool,
) -> torch.Tensor:
    """Routed experts: x [M, H], w13 [E, 2I, H] (gate rows first), w2 [E, H, I] -> [M, H].

    topk_ids [M, topk] are local expert ids, -1 = skip (padding, or an expert of another rank).
    Every (token, slot) product is weighted in float32 and rounded to x's dtype; the slots of a
    token are summed in float32 in slot order and rounded once.
    """
    M, topk = topk_ids.shape
    slots = torch.zeros(M, topk, x.shape[1], dtype=x.dtype, device=x.device)
    source = x * topk_weights.to(x.dtype) if weight_on_input else x
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = linear(
            source[token], w13[expert], sf13[expert],
            None if c13 is None else c13[expert], None, gran13, activation_scale,
        )  # fmt: skip
        hidden = fake_quant(silu_mul(gate_up), gran2[1], activation_scale)
        out = matmul(hidden, w2[expert], sf2[expert], gran2, None if c2 is None else c2[expert])
        if not weight_on_input:
            out *= topk_weights[token, slot, None].to(torch.float32)
        slots[token, slot] = out.to(x.dtype)
    return slots.to(torch.float32).sum(1).to(x.dtype)


def weight_quant(w: torch.Tensor, ue8m0: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] in 128x128 blocks to e4m3 -> codes, scales [.., ..].

    ue8m0: uint8 bytes >= 1, the smallest power of two that holds the block; otherwise float32
    amax / 448. DeepSeek's amax floor is a rule for activations and is not applied: a block of tiny
    weights keeps its precision. An all-zero block gets byte 1, or float32 scale 1. Raises
    ValueError for NaN or Inf weights.
    """
    N, K = w.shape
    rows, columns = ceil_div(N, 128), ceil_div(K, 128)
    values = torch.zeros(rows * 128, columns * 128, device=w.device)
    values[:N, :K] = w
    blocks = values.view(rows, 128, columns, 128)
    amax = blocks.abs().amax(3).amax(1)  # in this order 13x faster than amax((1, 3)) on the CPU
    if not bool(amax.isfinite().all()):
        raise ValueError("weight_quant: the weight holds NaN or Inf")
    if ue8m0:
        sf = quant_exponent(amax, SF_MIN).to(torch.uint8)
        scale = convert_scale_from_ue8m0(sf)
    else:
        # At least 2^-126: amax / 448 of a subnormal amax would lose bits, or be 0.
        scale = _divide_by_fp8_max(amax).clamp(min=torch.finfo(torch.float32).tiny)
        sf = scale = torch.where(amax == 0, 1.0, scale)
    blocks /= scale[:, None, :, None]
    return values[:N, :K].to(E4M3).contiguous(), sf
