"""Activation quantization: bf16/fp16/fp32 -> e4m3 codes, one scale per group of a row.

x [M, K], unit stride along K, any row stride;  q [M, K] e4m3;  s [M, ceil(K / GROUP)], both
contiguous. A last partial group is a group. s uint8: sf = ceil(log2(amax / 448)) + 127, at least
FLOOR, and q = e4m3(x * 2^(127 - sf)), one rounding. s float32: max(amax, 1e-4) / 448 and
q = e4m3(x / s). Groups with Inf or NaN: see reference.act_quant, equal bit for bit.
"""

import torch
import triton
import triton.language as tl

from .ue8m0 import quantize, to_float


@triton.jit(do_not_specialize=["M"])
def _act_quant_kernel(
    x, q, s, M, K, groups, stride_xm,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (row, group), flattened: below 2^31
    row, group = (pair // groups).to(tl.int64), pair % groups
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [ROWS, GROUP]
    used = row < M
    mask = used[:, None] & (k < K)
    values = to_float(tl.load(x + row[:, None] * stride_xm + k, mask=mask, other=0.0))
    codes, scale = quantize(values, s.dtype.element_ty == tl.uint8, FLOOR)
    tl.store(q + row[:, None] * K + k, codes, mask=mask)
    tl.store(s + pair, scale, mask=used)


def launch(x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, group: int, floor: int) -> None:
    """Quantize x into q and s; the dtype of s (uint8, float32) selects the kind of scale."""
    M, K = x.shape
    # 16 values a thread at 4 warps: 16-byte loads of bf16.
    rows = max(2048 // group, 1)
    stride = x.stride(0) if M > 1 else K
    _act_quant_kernel[(triton.cdiv(M * s.shape[1], rows),)](
        x, q.view(torch.uint8), s, M, K, s.shape[1], stride,
        FLOOR=floor, GROUP=group, ROWS=rows, num_warps=4,
    )  # fmt: skip
