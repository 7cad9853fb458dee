"""Scale grids of weights, and the memory layouts of activation scales.

A checkpoint's grid is 128x128, counted from the first row of *its* tensor. Where a tensor-parallel
shard or a fused layer starts inside a block, the same scales are repeated onto a finer grid that
divides every boundary: exact, and no weight is touched.

Activation scales [..., M, G], one per group of a row, have one of three layouts:
  row_major        contiguous
  mn_major         M contiguous, columns padded to 16 bytes as TMA wants: strides (1, padded M)
  mn_major_packed  int32 [..., M, ceil(G/4)], M contiguous and padded likewise; byte i of word j is
                   the UE8M0 byte of group 4j + i, 0 beyond the last group (DeepGEMM's SM100 layout)
Padding between M and the padded M is memory that no view reaches and no kernel writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

from .formats import BLOCK

SCALE_LAYOUTS = ("row_major", "mn_major", "mn_major_packed")
_TMA_ALIGNMENT = 16  # bytes


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def grid_shape(rows: int, columns: int, gran: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale tensor of a [rows, columns] weight."""
    return ceil_div(rows, gran[0]), ceil_div(columns, gran[1])


def common_gran(boundaries: list[int], block: int = BLOCK) -> int:
    """Coarsest granularity that divides the block and every boundary."""
    return gcd(block, *boundaries)


def output_gran(sizes: list[int], output_size: int) -> int:
    """Rows per scale of a fused layer's shards on one rank, of output_size rows in all ranks.

    128 unless a fused boundary or a shard falls inside a block.
    """
    sharded = sum(sizes) != output_size
    return common_gran(sizes if sharded else sizes[:-1])


def refine(scale: torch.Tensor, dim: int, gran: int, block: int = BLOCK) -> torch.Tensor:
    """Repeat scales of `block`-sized blocks along `dim` onto a grid of `gran` (divides block)."""
    return scale if gran == block else scale.repeat_interleave(block // gran, dim=dim)


def expand(scale: torch.Tensor, rows: int, columns: int, gran: tuple[int, int]) -> torch.Tensor:
    """One scale per element: [..., ceil(rows/gn), ceil(columns/gk)] -> [..., rows, columns]."""
    full = scale.repeat_interleave(gran[0], dim=-2).repeat_interleave(gran[1], dim=-1)
    return full[..., :rows, :columns]


def used_blocks(codes: torch.Tensor, gran: tuple[int, int]) -> torch.Tensor:
    """bool [..., ceil(N/gn), ceil(K/gk)]: whether a block of e4m3 [..., N, K] holds a code but +-0.

    Over a block of zeros any scale is exact, so what a checkpoint says there does not matter.
    """
    rows, columns = grid_shape(codes.shape[-2], codes.shape[-1], gran)
    padding = (0, columns * gran[1] - codes.shape[-1], 0, rows * gran[0] - codes.shape[-2])
    nonzero = torch.nn.functional.pad((codes.view(torch.uint8) & 0x7F) != 0, padding)
    blocks: torch.Tensor = nonzero.unflatten(-1, (columns, gran[1])).unflatten(-3, (rows, gran[0]))
    return blocks.any(-1).any(-2)


def empty_scale(
    leading: Sequence[int], M: int, groups: int, ue8m0: bool, layout: str,
    device: torch.device | str,
) -> torch.Tensor:  # fmt: skip
    """Uninitialized scales [*leading, M, groups] (words of 4 if packed) in a layout.

    ValueError for an unknown layout, and for packed float32 scales.
    """
    check_layout(layout, ue8m0)
    dtype = torch.uint8 if ue8m0 else torch.float32
    if layout == "row_major":
        return torch.empty(*leading, M, groups, dtype=dtype, device=device)
    columns = groups
    if layout == "mn_major_packed":
        dtype, columns = torch.int32, ceil_div(groups, 4)
    align = _TMA_ALIGNMENT // dtype.itemsize
    padded = ceil_div(M, align) * align
    return torch.empty(*leading, columns, padded, dtype=dtype, device=device).mT[..., :M, :]


def check_layout(layout: str, ue8m0: bool) -> None:
    if layout not in SCALE_LAYOUTS:
        raise ValueError(f"scale layout is {layout!r}; allowed: {', '.join(SCALE_LAYOUTS)}")
    if layout == "mn_major_packed" and not ue8m0:
        raise ValueError(
            "scale layout 'mn_major_packed' holds UE8M0 bytes; float32 scales can be row_major or "
            "mn_major"
        )


def to_layout(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """Row-major scales [..., M, G], uint8 or float32, copied into a layout."""
    *leading, M, G = scale.shape
    ue8m0 = scale.dtype == torch.uint8
    out = empty_scale(leading, M, G, ue8m0, layout, scale.device)
    if layout == "mn_major_packed":
        padded = torch.nn.functional.pad(scale, (0, -G % 4)).contiguous()
        return out.copy_(padded.view(torch.int32))
    return out.copy_(scale)


def from_layout(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """The inverse of to_layout: contiguous row-major scales [..., M, groups]."""
    rows = scale.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)[..., :groups].contiguous() if rows.dtype == torch.int32 else rows


def local_experts(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Ids of experts of this rank, -1 for others: expert_map [global experts] translates."""
    if expert_map is None:
        return topk_ids
    # -1 is padding already, and would be a valid wrong index.
    known = (topk_ids >= 0) & (topk_ids < len(expert_map))
    local = expert_map[torch.where(known, topk_ids, 0).to(torch.int64)]
    return torch.where(known, local.to(topk_ids.dtype), -1)
