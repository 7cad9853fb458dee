"""Routed experts' gate of few tokens: logits [M, E] of x [M, K] and w [E, K], 16-bit numbers.

E is small and K is large. With a program for some rows of w, most SMs would have none, and each of
the others would read all of K. So a program has a part of K, and another kernel adds the parts.
"""

from __future__ import annotations

import torch

from ..kernels import decode_bmm, sum_parts
from ..kernels.hopper_config import MAX_DECODE_ROWS
from .batched import DTYPES

# Of K. A norm and this, us on an H200 (2026-11-30; E 256, K 7168, cold weights) with parts of 128,
# 256, 512 and 1024: 5.2, 4.5, 4.4, 5.0 of one token, 6.2, 4.8, 4.7, 5.1 of 16, 9.8, 7.0, 5.7 of 64.
PART = 512


def gate(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x @ w.T, summed in float32 and rounded once to dtype.

    Raises ValueError where `gate_refusal` has a reason.
    """
    reason = gate_refusal(x, w)
    if reason is not None:
        raise ValueError(f"gate: {reason}")
    (M, K), E = x.shape, len(w)
    parts = torch.empty(K // PART, M, E, dtype=torch.float32, device=x.device)
    x, w = (rows.view(len(rows), K // PART, PART).transpose(0, 1) for rows in (x, w))
    decode_bmm.launch(x, w, parts)
    out = torch.empty(M, E, dtype=dtype, device=x.device)
    sum_parts.launch(parts, out)
    return out


def gate_refusal(x: torch.Tensor, w: torch.Tensor) -> str | None:
    """Why these are not multiplied so, or None."""
    if x.dtype != w.dtype or x.dtype not in DTYPES:
        return f"dtypes {x.dtype} and {w.dtype}: one of bfloat16 and float16 is taken"
    if not 0 < len(x) <= MAX_DECODE_ROWS:
        return f"{len(x)} rows: 1 to {MAX_DECODE_ROWS} are taken"
    E, K = w.shape
    if x.dim() != 2 or x.shape[1] != K or E % decode_bmm.BLOCK_N or K % PART:
        return (
            f"x {list(x.shape)} and w {list(w.shape)}: [M, K] and [E, K] are taken, E a multiple "
            f"of {decode_bmm.BLOCK_N} and K of {PART}"
        )
    if not (x.is_contiguous() and w.is_contiguous()) or (x.data_ptr() | w.data_ptr()) % 16:
        return "x or w is not contiguous from a multiple of 16 bytes on"
    return None
