"""Batched products of 16-bit numbers: few rows on decode_bmm, others on torch's library.

MLA's absorbed products are these, two of each layer of a decode step: the queries times W_UK, and
attention's result times W_UV.
"""

from __future__ import annotations

import torch

from ..kernels import decode_bmm
from ..kernels.hopper_config import MAX_DECODE_ROWS, tokens

# Rows times K above which the library is as fast or faster: docs/design.md has the figures.
MOST_PER_BATCH = 16384
DTYPES = (torch.bfloat16, torch.float16)


def bmm(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """out [H, M, N] = x [H, M, K] @ w [H, K, N], summed in float32 and rounded once: torch.bmm."""
    if bmm_refusal(x, w, out) is None:
        decode_bmm.launch(x, w.transpose(1, 2), out)
    else:
        torch.bmm(x, w, out=out)


def bmm_plan(M: int) -> int:
    """Configuration of decode_bmm for M rows."""
    return tokens(M)


def bmm_refusal(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> str | None:
    """Why decode_bmm does not multiply these, or None."""
    if not x.dtype == w.dtype == out.dtype or x.dtype not in DTYPES:
        return f"dtypes {x.dtype}, {w.dtype} and {out.dtype}: one of bfloat16 and float16 is taken"
    if not 0 < x.shape[1] <= _most_rows(x.shape[2]):
        return f"{x.shape[1]} rows of {x.shape[2]}: 1 to {_most_rows(x.shape[2])} are taken"
    if not _weight_fits(w):
        return "w is no contiguous [H, N, K], N a multiple of 64 and K of 128, seen as [H, K, N]"
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
        return "rows of x do not begin at multiples of 16 bytes"
    if out.stride(2) != 1:
        return "rows of out are not contiguous"
    return None


def _weight_fits(w: torch.Tensor) -> bool:
    """Whether decode_bmm multiplies by w [H, K, N] as it lies in memory."""
    _, K, N = w.shape
    return w.transpose(1, 2).is_contiguous() and bmm_shape_fits(N, K) and w.data_ptr() % 16 == 0


def bmm_shape_fits(N: int, K: int) -> bool:
    """Whether decode_bmm has such products: all of K of a tile is in shared memory."""
    return N % decode_bmm.BLOCK_N == 0 and K % decode_bmm.WIDTH == 0 and _most_rows(K) > 0


def _most_rows(K: int) -> int:
    return min(MAX_DECODE_ROWS, MOST_PER_BATCH // K)
