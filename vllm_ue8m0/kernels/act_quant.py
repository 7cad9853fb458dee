"""Activation quantization: bf16/fp16/fp32 -> e4m3 codes, one scale per group of a row.

x [E, M, K], unit stride along K;  q [E, M, K] e4m3 contiguous;  s [E, M, ceil(K / GROUP)] uint8 or
float32, or int32 words of 4 bytes, in a layout of layouts.py. A last partial group is a group.
UE8M0: sf = ceil(log2(amax / 448)) + 127, at least FLOOR, and q = e4m3(x * 2^(127 - sf)), one
rounding. float32: s = max(amax, 1e-4) / 448 and q = e4m3(x / s). Groups with Inf or NaN: see
reference.act_quant, equal bit for bit. counts, destinations, scale_rows: see tile.py.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, TileConfig, dependent_launch
from .replay import Launch, launched
from .tile import find_tile, scale_offset, store_tile, used_tiles, wait_for_inputs
from .ue8m0 import to_float


@triton.jit
def _tile(
    x, q, s, destinations, scale_rows, expert, tile, first_group, limit, M, K, groups, stride_xe,
    stride_xm, stride_s,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    k = first_group * GROUP + tl.arange(0, GROUPS * GROUP)
    mask = (row < limit)[:, None] & (k < K)[None, :]
    source = x + expert * stride_xe + row[:, None] * stride_xm + k[None, :]
    values = to_float(tl.load(source, mask=mask, other=0.0))
    if scale_rows is None:
        s += scale_offset(expert, M, groups, stride_s, MN_MAJOR, PACKED)
    else:  # of all experts: they share columns
        scale_rows += expert * M
    store_tile(
        values, q + expert * M * K, s,
        destinations, row, first_group, limit, K, groups, stride_s,
        FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES, scale_rows,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "stride_s"])
def _act_quant_kernel(
    x, q, s, counts, destinations, scale_rows, E, M, K, groups, stride_xe, stride_xm, stride_s,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, COPIES: tl.constexpr, EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    columns = tl.cdiv(groups, GROUPS)
    index, first_group = tl.program_id(0) // columns, tl.program_id(0) % columns * GROUPS
    if EXPERTS > 0:
        tiles, ends = used_tiles(counts, M, E, ROWS, EXPERTS)
        for i in range(index, tl.sum(tiles, 0), tl.num_programs(0) // columns):
            expert, tile, limit = find_tile(i, tiles, ends, counts, M)
            _tile(
                x, q, s, destinations, scale_rows, expert, tile, first_group, limit, M, K, groups,
                stride_xe, stride_xm, stride_s,
                FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES,
            )  # fmt: skip
    else:
        _tile(
            x, q, s, destinations, scale_rows, tl.program_id(1).to(tl.int64), index, first_group, M,
            M, K, groups, stride_xe, stride_xm, stride_s,
            FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES,
        )  # fmt: skip


@launched
def launch(
    x: torch.Tensor,
    q: torch.Tensor,
    s: torch.Tensor,
    group: int,
    floor: int,
    mn_major: bool,
    config: TileConfig,
    counts: torch.Tensor | None = None,
    destinations: torch.Tensor | None = None,
    scale_rows: torch.Tensor | None = None,
) -> Launch:
    """Quantize x into q and s; the dtype of s (uint8, float32, int32) selects the kind of scale."""
    E, M, K = x.shape
    groups = triton.cdiv(K, group)
    return Launch(
        _act_quant_kernel, config.grid(E, M, groups, counts is not None),
        x, q.view(torch.uint8), s, counts, destinations, scale_rows, E, M, K, groups,
        x.stride(0) if E > 1 else 0, x.stride(1) if M > 1 else K, s.stride(2),
        FLOOR=floor, GROUP=group, ROWS=config.rows, GROUPS=config.groups,
        MN_MAJOR=mn_major, PACKED=s.dtype == torch.int32,
        COPIES=0 if destinations is None else destinations.shape[1],
        EXPERTS=0 if counts is None else triton.next_power_of_2(E),
        num_warps=config.num_warps, **dependent_launch(x.device), **FMA,
    )  # fmt: skip
