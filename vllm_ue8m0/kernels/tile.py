"""The tile of activations that a program quantizes, and where its codes and scales go.

A tile is ROWS rows times GROUPS groups of GROUP columns of one of E matrices [M, K]. With counts,
matrix e uses its first counts[e] rows, the others are not written, and programs share the used
tiles of all matrices evenly: a fixed grid serves any counts. With COPIES > 0, row m goes to the
COPIES rows destinations[m, :] of the output instead of row m (-1: to none), which permutes tokens
to their experts on the way. Scales go to other rows than codes if there are scale_rows, laid out as
destinations are, or [E, M].

Scales are row-major, or column-major with columns stride_s apart; PACKED: column-major int32 words
of four bytes (layouts.py).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ue8m0 import quantize


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Under programmatic dependent launch this kernel starts before its predecessor has ended.

    Every program has to wait before it touches memory that another kernel reads or writes. Letting
    successors start at once is safe for the same reason: they wait for this kernel's end.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def start_dependents_and_wait(PDL: tl.constexpr):
    """wait_for_inputs of a kernel that a product follows: that one fetches its weights meanwhile.

    Not before routed experts: they would take SMs that shared experts are to run on. Nor before
    products of shared experts (act_quant, silu_mul_quant of many rows): while these wait for SMs,
    the router and what sorts tokens, on another stream, do not start.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def used_tiles(counts, M, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Tiles of each matrix's used rows, and how many there are up to its end: int32 [EXPERTS]."""
    expert = tl.arange(0, EXPERTS)
    used = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
    tiles = tl.cdiv(tl.minimum(used, M), ROWS)
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(index, tiles, ends, counts, M):
    """The index-th used tile -> (its matrix, tile within it, used rows of the matrix)."""
    before = ends <= index
    expert = tl.sum(before.to(tl.int32), 0)
    tile = index - tl.sum(tl.where(before, tiles, 0), 0)
    return expert.to(tl.int64), tile, tl.minimum(tl.load(counts + expert).to(tl.int32), M)


@triton.jit
def scale_offset(
    expert, M, groups, stride_s, MN_MAJOR: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Where a matrix's scales start."""
    if MN_MAJOR:
        return expert * stride_s * tl.cdiv(groups, 4 if PACKED else 1)
    else:
        return expert * M * groups


@triton.jit
def store_tile(
    values, q, s, destinations, row, first_group, limit, K, groups, stride_s,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, COPIES: tl.constexpr, scale_rows=None,
    WIDTH: tl.constexpr = 0,
):  # fmt: skip
    """Quantize float32 values [ROWS, GROUPS * GROUP] of rows `row` and store codes and scales.

    WIDTH: codes that a thread stores at once, at most; 0: as many as it can.
    """
    COPIES_LOADED: tl.constexpr = triton.next_power_of_2(COPIES)
    ue8m0: tl.constexpr = PACKED or s.dtype.element_ty == tl.uint8
    codes, scale = quantize(tl.reshape(values, [ROWS * GROUPS, GROUP]), ue8m0, FLOOR)
    codes = tl.reshape(codes, [ROWS, GROUPS * GROUP])
    scale = tl.reshape(scale, [ROWS, GROUPS])
    group = first_group + tl.arange(0, GROUPS)
    if PACKED:
        scale = tl.where(group[None, :] < groups, scale.to(tl.int32), 0)
        scale = scale << ((tl.arange(0, GROUPS) % 4) * 8)[None, :]
        scale = tl.sum(tl.reshape(scale, [ROWS, GROUPS // 4, 4]), axis=2)
        column = first_group // 4 + tl.arange(0, GROUPS // 4)
        column_used = column * 4 < groups
    else:
        column, column_used = group, group < groups
    k = first_group * GROUP + tl.arange(0, GROUPS * GROUP)
    if COPIES > 0:
        # All places before the first store, which might have changed them for all that LLVM knows.
        each = tl.arange(0, COPIES_LOADED)
        spot = row[:, None] * COPIES + each[None, :]
        some = (row < limit)[:, None] & (each < COPIES)[None, :]
        places = tl.load(destinations + spot, mask=some, other=-1)
        if scale_rows is not None:
            scale_places = tl.load(scale_rows + spot, mask=places >= 0, other=0)
    for copy in tl.static_range(COPIES if COPIES > 0 else 1):
        if COPIES > 0:
            target = tl.sum(tl.where(each[None, :] == copy, places, 0), 1).to(tl.int64)
            used = target >= 0
        else:
            target, used = row, row < limit
        mask = used[:, None] & (k < K)[None, :]
        place = q + target[:, None] * K + k[None, :]
        if WIDTH > 0:
            place = tl.max_contiguous(place, [1, WIDTH])
        tl.store(place, codes, mask=mask)
        if scale_rows is not None:
            if COPIES > 0:
                target = tl.sum(tl.where(each[None, :] == copy, scale_places, 0), 1).to(tl.int64)
            else:
                target = tl.load(scale_rows + row, mask=used, other=0).to(tl.int64)
        if MN_MAJOR:
            scales = s + column.to(tl.int64)[None, :] * stride_s + target[:, None]
        else:
            scales = s + target[:, None] * groups + column[None, :]
        tl.store(scales, scale, mask=used[:, None] & column_used[None, :])
