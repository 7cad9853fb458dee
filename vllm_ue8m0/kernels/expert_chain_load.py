"""What expert_chain reads: its units, told by the copying warp with the copies it starts."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .expert_load import copy_pair
from .hopper import barrier, copy_to_shared, fence_async_global, next_stage, wait_for_inputs
from .route import TILE_FIELDS

FIELDS = gl.constexpr(8)  # that copy_chain tells of a unit, with one to spare


@gluon.jit
def chain_unit(unit, units, gated_units, tiles, gated_n, down_n):
    """Whether it is gated; its tile; that one's expert, first row, end, scales' first; columns."""
    unit = gl.minimum(unit, gl.maximum(units - 1, 0))
    gated = unit < gated_units
    local = gl.where(gated, unit, unit - gated_units)
    width = gl.where(gated, gated_n, down_n)
    tile = local // width
    entry = tiles + tile * TILE_FIELDS
    expert = gl.load(entry)
    row = gl.load(entry + 1)
    end = gl.load(entry + 2)
    scale_row = gl.load(entry + 5)
    return gated, tile, expert, row, end, scale_row, local % width


@gluon.jit
def _tell(next_smem, stage, unit, tile, expert, row, end, scale_row, kind):
    """A unit's number and fields, FIELDS places for a stage; kind: 2 * columns + gated."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    spot = stage * FIELDS
    next_smem.index(spot).store(gl.full([1], unit, gl.int32, line))
    next_smem.index(spot + 1).store(gl.full([1], tile, gl.int32, line))
    next_smem.index(spot + 2).store(gl.full([1], expert, gl.int32, line))
    next_smem.index(spot + 3).store(gl.full([1], row, gl.int32, line))
    next_smem.index(spot + 4).store(gl.full([1], end, gl.int32, line))
    next_smem.index(spot + 5).store(gl.full([1], scale_row, gl.int32, line))
    next_smem.index(spot + 6).store(gl.full([1], kind, gl.int32, line))
    barrier()


@gluon.jit
def told(next_smem, spot, WARPS: gl.constexpr):
    """Of `_tell`, by the multiplying warps."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(next_smem.index(spot).load(one), 0)


@gluon.jit
def copy_chain(
    w13_desc, w2_desc, a_desc, as_desc, h_desc, hs_desc, tiles, num_tiles, progress,
    w_smem, a_smem, as_smem, next_smem, ready, empty, gated_n, down_n, H, gated_NK,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp of expert_chain. It takes units as they come, two before they are due.

    With a unit's first stage it tells what the next one is, so that its scales are there in time.
    """
    nbytes: gl.constexpr = (
        2 * w13_desc.block_type.nbytes + a_desc.block_type.nbytes + as_desc.block_type.nbytes
    )
    programs = gl.num_programs(0)
    wait_for_inputs()
    number = gl.load(num_tiles)
    gated_units = number * gated_n
    units = gated_units + number * down_n
    unit = gl.program_id(0)
    following = unit + programs
    stage, phase = 0, 1
    if unit < units:
        gated, tile, expert, row, _, scale_row, n = chain_unit(
            unit, units, gated_units, tiles, gated_n, down_n
        )
    else:
        gated, tile, expert, row, scale_row, n = unit < 0, 0, 0, 0, 0, 0
    while unit < units:
        gated1, tile1, expert1, row1, end1, scale_row1, n1 = chain_unit(
            following, units, gated_units, tiles, gated_n, down_n
        )
        kind1 = 2 * n1 + gated1.to(gl.int32)
        steps = gl.where(gated, gated_NK, gated_n)
        # Weights of the whole ring before the second product's inputs are waited for.
        ahead = gl.where(gated, 0, gl.minimum(steps, STAGES))
        begin, begin_phase = stage, phase
        for k in range(ahead):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if k == 0:
                _tell(next_smem, stage, following, tile1, expert1, row1, end1, scale_row1, kind1)
            mbarrier.expect(bar, nbytes)
            copy_pair(w2_desc, w_smem, bar, stage, expert, n, k, H, True, False)
            stage, phase = next_stage(stage, phase, 1, STAGES)
        if not gated:
            flag = progress + 1 + tile
            while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") < gated_n:
                pass
            fence_async_global()
        slot, slot_phase = begin, begin_phase
        for k in range(steps):
            bar = ready.index(slot)
            if k >= ahead:
                mbarrier.wait(empty.index(slot), slot_phase)
                if k == 0:
                    _tell(next_smem, slot, following, tile1, expert1, row1, end1, scale_row1, kind1)
                mbarrier.expect(bar, nbytes)
                if gated:
                    N = 2 * gated_n * 128
                    copy_pair(w13_desc, w_smem, bar, slot, expert, n, k, N, True, True)
                else:
                    copy_pair(w2_desc, w_smem, bar, slot, expert, n, k, H, True, False)
            if gated:
                copy_to_shared(a_desc, [row, k * 128], bar, a_smem.index(slot))
                copy_to_shared(as_desc, [k, scale_row], bar, as_smem.index(slot))
            else:
                copy_to_shared(h_desc, [row, k * 128], bar, a_smem.index(slot))
                copy_to_shared(hs_desc, [k, scale_row], bar, as_smem.index(slot))
            slot, slot_phase = next_stage(slot, slot_phase, 1, STAGES)
        stage, phase = slot, slot_phase
        unit, gated, tile, expert = following, gated1, tile1, expert1
        row, scale_row, n = row1, scale_row1, n1
        following = gl.atomic_add(progress, 1, sem="relaxed", scope="gpu") + 2 * programs
