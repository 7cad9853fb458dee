"""What the experts' kernels read: which unit is whose, w and its scales, one token."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper import (
    barrier,
    copy_to_shared,
    next_stage,
    quantize,
    reinterpret,
    start_dependents,
    wait_for_inputs,
)
from .route import LEAST_PITCH, TILE_FIELDS


@gluon.jit
def local_expert(id, expert_map, num_experts, num_global):
    """The expert at a pointer, -1 if it is not here; see route.py."""
    expert = gl.load(id).to(gl.int32)
    if expert_map is not None:
        known = (expert >= 0) & (expert < num_global)
        expert = gl.load(expert_map + gl.where(known, expert, 0)).to(gl.int32)
        expert = gl.where(known, expert, -1)
    return gl.where(expert < num_experts, expert, -1)


@gluon.jit
def unit_tile(
    unit, tiles, ids, expert_map, tiles_n, num_experts, num_global,
    SPLITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Expert (-1: none), first row and end of a tile, its scales' first; column tile; part of K."""
    index = unit // (tiles_n * SPLITS)
    if TOPK > 0:
        expert = local_expert(ids + index, expert_map, num_experts, num_global)
        row = index
        end = index + 1
        scale_row = index * LEAST_PITCH
    else:
        tiles += index * TILE_FIELDS
        expert = gl.load(tiles)
        row = gl.load(tiles + 1)
        end = gl.load(tiles + 2)
        scale_row = gl.load(tiles + 5)
    return expert, row, end, scale_row, unit // SPLITS % tiles_n, unit % SPLITS


@gluon.jit
def part(split, NK, SPLITS: gl.constexpr, STEP: gl.constexpr):
    """First block of K of a part and the number of its stages."""
    stages = gl.cdiv(NK, STEP)
    first = split * stages // SPLITS
    return first * STEP, (split + 1) * stages // SPLITS - first


@gluon.jit
def weight_scales(
    sf, expert, n, first, NK, N, stride_se, stride_sn, BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr, GATED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """[BLOCKS] of a column tile; of its gate and its up rows, or twice the same."""
    block: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    k = gl.minimum(first + gl.arange(0, BLOCKS, block), NK - 1)
    sf += gl.maximum(expert, 0).to(gl.int64) * stride_se + n * BLOCK_N // 128 * stride_sn
    second = sf + (N // 256 * stride_sn if GATED else 0)
    return gl.load(sf + k), gl.load(second + k)


@gluon.jit
def quantize_token(
    x, a_smem, as_smem, K, first,
    TOKENS: gl.constexpr, BLOCKS: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """This part's groups of the token -> row 0 of codes and scales; zeros in the others."""
    ROWS: gl.constexpr = 8 * BLOCKS if BLOCKS < 2 * WARPS else 16 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, layout)), 0)
    codes = reinterpret(a_smem, gl.float8e4nv, [BLOCKS * TOKENS // ROWS, ROWS, 128], a_smem.layout)
    scales = reinterpret(as_smem, gl.float32, [BLOCKS * TOKENS // ROWS, ROWS], as_smem.layout)
    for i in gl.static_range(BLOCKS * TOKENS // ROWS):
        block = i * (ROWS // TOKENS) + row // TOKENS
        k = gl.expand_dims((first + block) * 128, 1) + column
        used = gl.expand_dims(row % TOKENS == 0, 1) & (k < K)
        values = gl.load(x + k, mask=used, other=0.0).to(gl.float32)
        code, scale = quantize(values, UE8M0, FLOOR)
        codes.index(i).store(code)
        scales.index(i).store(scale)
    fence_async_shared()


@gluon.jit
def ordered_unit(unit, units, tiles, tiles_n):
    """Expert, first row, end, scales' first row, and column tile; of the last unit beyond.

    An expert's tiles of the same columns of w follow one another.
    """
    unit = gl.minimum(unit, gl.maximum(units - 1, 0))
    entry = tiles + unit // tiles_n * TILE_FIELDS
    first = gl.load(entry + 3)
    number = gl.load(entry + 4)
    local = unit - first * tiles_n
    entry = tiles + (first + local % number) * TILE_FIELDS
    scale_row = gl.load(entry + 5)
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), scale_row, local // number


@gluon.jit
def copy_weights(w_desc, w_smem, bar, stage, expert, n, k, N, pred, GATED: gl.constexpr):
    """A stage of expert_decode."""
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    row = expert * N + n * BLOCK_N
    if GATED:
        second = row + N // 2
        ahead = k
    else:
        second = row
        ahead = k + 1
    copy_to_shared(w_desc, [row, k * 128], bar, w_smem.index(2 * stage), pred=pred)
    copy_to_shared(w_desc, [second, ahead * 128], bar, w_smem.index(2 * stage + 1), pred=pred)


@gluon.jit
def copy_pair(w_desc, w_smem, bar, stage, expert, n, k, N, pred, GATED: gl.constexpr):
    if GATED:
        row = expert * N + n * 128
        second = row + N // 2
    else:
        row = expert * N + n * 256
        second = row + 128
    copy_to_shared(w_desc, [row, k * 128], bar, w_smem.index(2 * stage), pred=pred)
    copy_to_shared(w_desc, [second, k * 128], bar, w_smem.index(2 * stage + 1), pred=pred)


@gluon.jit
def copy_ordered(
    a_desc, as_desc, w_desc, a_smem, as_smem, w_smem, next_smem, ready, empty, tiles, num_tiles,
    counter, tiles_n, N, NK, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The producer warp of expert_prefill. It takes units as they come, two before they are due."""
    A_BYTES: gl.constexpr = a_desc.block_type.nbytes + as_desc.block_type.nbytes
    nbytes: gl.constexpr = A_BYTES + 2 * w_desc.block_type.nbytes
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    programs = gl.num_programs(0)
    if GATED:
        wait_for_inputs()
    start_dependents()  # what follows the other product waits before it reads its results
    # What wrote the tiles ended before the kernel that let this one start.
    units = gl.load(num_tiles) * tiles_n
    unit = gl.program_id(0)
    following = unit + programs
    early = 0
    if not GATED:
        if unit < units:
            expert, _, _, _, n = ordered_unit(unit, units, tiles, tiles_n)
            early = gl.minimum(NK, STAGES)
            for i in range(early):
                mbarrier.expect(ready.index(i), nbytes)
                copy_pair(w_desc, w_smem, ready.index(i), i, expert, n, i, N, True, GATED)
        wait_for_inputs()
    stage, phase, done = 0, 1, 0
    if unit < units:
        expert, row, _, scale_row, n = ordered_unit(unit, units, tiles, tiles_n)
    else:
        expert, row, scale_row, n = 0, 0, 0, 0
    while unit < units:
        for k in range(NK):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if k == 0:
                next_smem.index(stage).store(gl.full([1], following, gl.int32, line))
                barrier()
            late = done >= early
            mbarrier.expect(bar, nbytes, pred=late)
            copy_pair(w_desc, w_smem, bar, stage, expert, n, k, N, late, GATED)
            copy_to_shared(a_desc, [row, k * 128], bar, a_smem.index(stage))
            copy_to_shared(as_desc, [k, scale_row], bar, as_smem.index(stage))
            done += 1
            stage, phase = next_stage(stage, phase, 1, STAGES)
        expert, row, _, scale_row, n = ordered_unit(following, units, tiles, tiles_n)
        taken = gl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
        if taken == units - 1:
            gl.store(counter, 0)  # every unit takes one, so this is the last
        unit = following
        following = taken + 2 * programs
