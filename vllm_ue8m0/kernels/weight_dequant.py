"""Weight dequantization: e4m3 [E, N, K] times its scale grid (and row factor) -> bf16/fp16/fp32.

w [E, N, K], unit stride along K;  sf [E, ceil(N / gn), ceil(K / gk)] uint8 or float32 and
c [E, ceil(N / gn)] float32 or None, contiguous;  out [E, N, K] contiguous. The value is
(code * scale) * c in float32, rounded once to out's dtype. Power-of-two scales: exact in bf16.
"""

import torch
import triton
import triton.language as tl

from .config import FMA
from .ue8m0 import decode, round_to, to_float


@triton.jit
def _weight_dequant_kernel(
    w, sf, c, out, N, K, scale_rows, scale_columns, stride_we, stride_wn, GRAN_N, GRAN_K,
    HAS_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    mask = (n < N) & (k < K)
    row = n.to(tl.int64)
    scale_row = expert * scale_rows + row // GRAN_N
    codes = tl.load(w + expert * stride_we + row * stride_wn + k, mask=mask, other=0)
    scale = decode(tl.load(sf + scale_row * scale_columns + k // GRAN_K, mask=mask, other=0))
    values = to_float(codes) * scale
    if HAS_C:
        values *= tl.load(c + scale_row, mask=n < N, other=0.0)
    tl.store(out + (expert * N + row) * K + k, round_to(values, out.dtype.element_ty), mask=mask)


# Rows, columns, warps. H100, 2026-11-22, 36864 x 7168, share of a copy's speed: 16 x 256 0.98,
# 32 x 128 0.96, 8 x 512 0.65.
TILE = (16, 256, 4)


def launch(
    w: torch.Tensor, sf: torch.Tensor, c: torch.Tensor | None, gran: tuple[int, int],
    out: torch.Tensor,
) -> None:  # fmt: skip
    E, N, K = w.shape
    block_n, block_k, num_warps = TILE
    _weight_dequant_kernel[(triton.cdiv(K, block_k), triton.cdiv(N, block_n), E)](
        w.view(torch.uint8), sf, c, out, N, K, sf.shape[1], sf.shape[2], w.stride(0), w.stride(1),
        *gran,
        HAS_C=c is not None, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, **FMA,
    )  # fmt: skip
