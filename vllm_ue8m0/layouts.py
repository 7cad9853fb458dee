"""Scale grids: one scale per (gran_n, gran_k) rectangle of a weight, and refining that grid.

A checkpoint's grid is 128x128, counted from the first row of *its* tensor. Where a tensor-parallel
shard or a fused layer starts inside a block, the same scales are repeated onto a finer grid that
divides every boundary: exact, and no weight is touched.
"""

from __future__ import annotations

from math import gcd

import torch

from .formats import BLOCK


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def grid_shape(rows: int, columns: int, gran: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale tensor of a [rows, columns] weight."""
    return ceil_div(rows, gran[0]), ceil_div(columns, gran[1])


def common_gran(boundaries: list[int], block: int = BLOCK) -> int:
    """Coarsest granularity that divides the block and every boundary."""
    return gcd(block, *boundaries)


def refine(scale: torch.Tensor, dim: int, gran: int, block: int = BLOCK) -> torch.Tensor:
    """Repeat scales of `block`-sized blocks along `dim` onto a grid of `gran` (divides block)."""
    return scale if gran == block else scale.repeat_interleave(block // gran, dim=dim)


def expand(scale: torch.Tensor, rows: int, columns: int, gran: tuple[int, int]) -> torch.Tensor:
    """One scale per element: [..., ceil(rows/gn), ceil(columns/gk)] -> [..., rows, columns]."""
    full = scale.repeat_interleave(gran[0], dim=-2).repeat_interleave(gran[1], dim=-1)
    return full[..., :rows, :columns]
