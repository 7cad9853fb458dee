"""silu(gate) * up, quantized: [M, 2 I] -> e4m3 [M, I] with one scale per group, or not quantized.

gate_up [M, 2 I]: gate columns first, unit stride along columns. silu(gate) is rounded to the
input's dtype, and so is its product with up, as `F.silu(w1(x)) * w3(x)` rounds them; groups of
the result are then quantized exactly as act_quant does. out [M, I] contiguous: e4m3, with scales
s [M, ceil(I / GROUP)] uint8 or float32; or the input's dtype with s None, and nothing quantized.
silu is computed with the device's fast exponential: before rounding a few float32 ulp from exact.
"""

import torch
import triton
import triton.language as tl

from .ue8m0 import quantize, round_to, to_float


@triton.jit(do_not_specialize=["M"])
def _silu_mul_quant_kernel(
    gate_up, out, s, M, columns, groups, stride_m,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = gate_up.dtype.element_ty
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (row, group), flattened: below 2^31
    row, group = (pair // groups).to(tl.int64), pair % groups
    i = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [ROWS, GROUP]
    used = row < M
    mask = used[:, None] & (i < columns)
    source = gate_up + row[:, None] * stride_m + i
    gate = to_float(tl.load(source, mask=mask, other=0.0))
    up = to_float(tl.load(source + columns, mask=mask, other=0.0))
    silu = to_float(round_to(gate / (1.0 + tl.exp(-gate)), dtype))
    hidden = round_to(silu * up, dtype)
    target = out + row[:, None] * columns + i
    if QUANTIZE:
        codes, scale = quantize(to_float(hidden), s.dtype.element_ty == tl.uint8, FLOOR)
        tl.store(target, codes, mask=mask)
        tl.store(s + pair, scale, mask=used)
    else:
        tl.store(target, hidden, mask=mask)


def launch(
    gate_up: torch.Tensor, out: torch.Tensor, s: torch.Tensor | None, group: int, floor: int
) -> None:
    """Write silu(gate) * up to out, quantized if s is given."""
    M, columns = out.shape
    groups, rows = triton.cdiv(columns, group), max(2048 // group, 1)
    stride = gate_up.stride(0) if M > 1 else 2 * columns
    _silu_mul_quant_kernel[(triton.cdiv(M * groups, rows),)](
        gate_up, out if s is None else out.view(torch.uint8), s, M, columns, groups, stride,
        FLOOR=floor, GROUP=group, ROWS=rows, QUANTIZE=s is not None, num_warps=4,
    )  # fmt: skip
