"""Both products of routed experts with few rows in one launch on sm_90, limited by reading weights.

Operands, rounding and tiles are expert_prefill's, both products in a row: a [slots, H] sorted by
expert -> hidden [slots, I], codes and scales -> out [slots, H], a row times its slot's weight, at
its slot. Swap-AB and the sum of every element are decode_gemm's: 128 rows of w to TOKENS of a tile.

A unit is 128 columns of gate and of up, or 256 columns of the second product; all of the first come
before any of the second, and programs take them in order, when they are ready. A unit of the second
product may start when all of its tile's first ones are done, which they mostly are long before: the
stream of weights does not end between the products, and no program is without work while others
multiply the last units of the first. `progress` counts units that were taken, and what is done of
each tile. Codes and scales of hidden are ordinary stores that the copy engine reads, hence fences.

Nothing waits for a program that has not started: what a unit needs comes before it, and was taken
by a program that runs.
"""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..layouts import ceil_div
from .config import FMA
from .expert_chain_load import FIELDS, chain_unit, copy_chain, told
from .expert_config import CHAIN_REGISTERS, CHAIN_WARPS
from .expert_store import column_layout, store_gated, store_weighted
from .hopper import (
    barrier,
    code_tiles,
    fence_async_global,
    float_scale,
    next_stage,
    reinterpret,
    scale_columns,
    start_dependents,
    wait_for_inputs,
)
from .replay import Launch, launched
from .route import Routing

# Copied of a block of K: what shared memory of the copy engine is aligned to.
SCALES = gl.constexpr(128)


@gluon.jit
def _scales(
    sf13, sf2, gated, expert, n, gated_n, gated_NK, down_blocks, stride_se13, stride_sn13,
    stride_se2, stride_sn2, BLOCKS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Twice [BLOCKS], of both tiles of w of a unit."""
    block: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    k = gl.arange(0, BLOCKS, block)
    expert = expert.to(gl.int64)
    if gated:
        first = sf13 + expert * stride_se13 + n * stride_sn13
        k = gl.minimum(k, gated_NK - 1)
        s0 = gl.load(first + k)
        s1 = gl.load(first + gated_n * stride_sn13 + k)
    else:
        first = sf2 + expert * stride_se2
        k = gl.minimum(k, gated_n - 1)
        s0 = gl.load(first + 2 * n * stride_sn2 + k)
        s1 = gl.load(first + gl.minimum(2 * n + 1, down_blocks - 1) * stride_sn2 + k)
    return s0, s1


@gluon.jit
def _targets(order, source, end, gated):
    """Slots of rows of the second product."""
    return gl.load(order + source, mask=(source < end) & (not gated), other=0)


@gluon.jit
def _weights(slot_weights, slot, used):
    if slot_weights is None:
        return None
    return gl.load(slot_weights + slot, mask=used, other=0.0).to(gl.float32)


@gluon.jit
def _multiply(
    sf13, sf2, c13, c2, hidden, hidden_s, out, order, slot_weights, tiles, num_tiles, progress,
    w_smem, a_smem, as_smem, ws_smem, next_smem, ready, empty,
    gated_n, down_n, H, gated_NK, stride_se13, stride_sn13, stride_se2, stride_sn2, stride_hs,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, UE8M0: gl.constexpr,
    FLOOR: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 32])
    along: gl.constexpr = gl.SliceLayout(0, mma)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    columns: gl.constexpr = gl.SliceLayout(0, column_layout(128, WARPS))
    ws_each = reinterpret(ws_smem, gl.float32, [4 * BLOCKS, 1], line)
    SKIP: gl.constexpr = SCALES // TOKENS  # row r of a block's scales is at r * SKIP
    scales = reinterpret(as_smem, as_smem.dtype, [STAGES * SKIP, TOKENS], line)
    wait_for_inputs()
    start_dependents()
    number = gl.load(num_tiles)
    gated_units = number * gated_n
    units = gated_units + number * down_n
    down_blocks = (H + 127) // 128
    unit = gl.program_id(0)
    if unit < units:
        gated, tile, expert, row, end, scale_row, n = chain_unit(
            unit, units, gated_units, tiles, gated_n, down_n
        )
        s0, s1 = _scales(
            sf13, sf2, gated, expert, n, gated_n, gated_NK, down_blocks, stride_se13, stride_sn13,
            stride_se2, stride_sn2, BLOCKS, WARPS,
        )  # fmt: skip
        ws_smem.index(0).store(float_scale(s0))
        ws_smem.index(1).store(float_scale(s1))
        barrier()
    else:  # nothing to do; of the same types
        gated, tile, expert, row, end, scale_row, n = unit < 0, 0, 0, 0, 0, 0, 0
    token = gl.arange(0, TOKENS, columns)
    target = _targets(order, row + token, end, gated)
    stage, phase, side = 0, 0, 0
    raw0 = gl.zeros([128, TOKENS], gl.float32, mma)
    raw1 = gl.zeros([128, TOKENS], gl.float32, mma)
    while unit < units:
        mbarrier.wait(ready.index(stage), phase)
        spot = stage * FIELDS
        following = told(next_smem, spot, WARPS)
        tile1 = told(next_smem, spot + 1, WARPS)
        expert1 = told(next_smem, spot + 2, WARPS)
        row1 = told(next_smem, spot + 3, WARPS)
        end1 = told(next_smem, spot + 4, WARPS)
        scale_row1 = told(next_smem, spot + 5, WARPS)
        kind1 = told(next_smem, spot + 6, WARPS)
        gated1 = kind1 % 2 == 1
        n1 = kind1 // 2
        # The next unit's weight scales reach shared memory while this one multiplies.
        s0, s1 = _scales(
            sf13, sf2, gated1, expert1, n1, gated_n, gated_NK, down_blocks, stride_se13,
            stride_sn13, stride_se2, stride_sn2, BLOCKS, WARPS,
        )  # fmt: skip
        # So do the slots of its rows; of this unit's, known by now, the weights.
        target1 = _targets(order, row1 + token, end1, gated1)
        weight = _weights(slot_weights, target, row + token < end)
        acc0 = gl.zeros([128, TOKENS], gl.float32, mma)
        acc1 = gl.zeros([128, TOKENS], gl.float32, mma)
        steps = gl.where(gated, gated_NK, gated_n)
        for i in range(steps):
            mbarrier.wait(ready.index(stage), phase)
            a = a_smem.index(stage).permute((1, 0))
            token0 = warpgroup_mma(w_smem.index(2 * stage), a, raw0, use_acc=False, is_async=True)
            token1 = warpgroup_mma(
                w_smem.index(2 * stage + 1), a, raw1, use_acc=False, is_async=True
            )
            f = float_scale(scales.index(stage * SKIP).load(along))
            spot = side * 2 * BLOCKS + i
            f0 = f * ws_each.index(spot).load(along)
            f1 = f * ws_each.index(spot + BLOCKS).load(along)
            raw0 = warpgroup_mma_wait(1, deps=[token0])
            acc0 = gl.fma(raw0, gl.expand_dims(f0, 0).broadcast_to(acc0.shape), acc0)
            raw1 = warpgroup_mma_wait(0, deps=[token1])
            mbarrier.arrive(empty.index(stage), count=1)
            acc1 = gl.fma(raw1, gl.expand_dims(f1, 0).broadcast_to(acc0.shape), acc1)
            stage, phase = next_stage(stage, phase, 1, STAGES)
        side = side ^ 1
        ws_smem.index(2 * side).store(float_scale(s0))
        ws_smem.index(2 * side + 1).store(float_scale(s1))
        if gated:
            store_gated(
                acc0, acc1, c13, hidden, hidden_s, None, None, expert, row, end, scale_row, n, 0,
                0, 2 * gated_n * 128, stride_hs, 128, TOKENS, 1, UE8M0, FLOOR, DTYPE, WARPS, mma,
            )  # fmt: skip
            fence_async_global()
            barrier()
            gl.atomic_add(progress + 1 + tile, 1, sem="release", scope="gpu")
        else:
            used = row + token < end
            store_weighted(acc0, c2, out, weight, expert, target, used, 2 * n, H, 128, WARPS)
            store_weighted(acc1, c2, out, weight, expert, target, used, 2 * n + 1, H, 128, WARPS)
            barrier()
        unit, gated, tile, expert = following, gated1, tile1, expert1
        row, end, scale_row, n, target = row1, end1, scale_row1, n1, target1


@gluon.jit
def _expert_chain_kernel(
    w13_desc, w2_desc, a_desc, as_desc, h_desc, hs_desc, sf13, sf2, c13, c2, hidden, hidden_s,
    out, order, slot_weights, tiles, num_tiles, progress,
    gated_n, down_n, H, gated_NK, stride_se13, stride_sn13, stride_se2, stride_sn2, stride_hs,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, UE8M0: gl.constexpr,
    FLOOR: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """BLOCKS: a power of two, at least the blocks of K of both products."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 128, 128], w13_desc.layout)
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TOKENS, 128], a_desc.layout)
    as_smem = gl.allocate_shared_memory(as_desc.dtype, [STAGES, 1, SCALES], as_desc.layout)
    ws_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCKS], line)
    next_smem = gl.allocate_shared_memory(gl.int32, [STAGES * FIELDS, 1], line)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                sf13, sf2, c13, c2, hidden, hidden_s, out, order, slot_weights, tiles, num_tiles,
                progress, w_smem, a_smem, as_smem, ws_smem, next_smem, ready, empty,
                gated_n, down_n, H, gated_NK, stride_se13, stride_sn13, stride_se2, stride_sn2,
                stride_hs, TOKENS, STAGES, BLOCKS, UE8M0, FLOOR, DTYPE, WARPS,
            )),
            (copy_chain, (
                w13_desc, w2_desc, a_desc, as_desc, h_desc, hs_desc, tiles, num_tiles, progress,
                w_smem, a_smem, as_smem, next_smem, ready, empty, gated_n, down_n, H, gated_NK,
                STAGES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor,
    c13: torch.Tensor | None, hidden: torch.Tensor, hidden_s: torch.Tensor, w2: torch.Tensor,
    sf2: torch.Tensor, c2: torch.Tensor | None, out: torch.Tensor, *,
    slot_weights: torch.Tensor | None, routing: Routing, rows: int, stages: int, programs: int,
    ue8m0: bool, floor: int, dtype: torch.dtype,
) -> Launch:  # fmt: skip
    """a [slots, H] sorted -> hidden [slots, I] -> out [slots, H], a row at its slot.

    routing: to tiles of `rows` rows, with `progress`. stages: of a program's ring.
    """
    (E, N, H), I = w13.shape, w2.shape[2]  # noqa: E741
    gated_n, gated_NK = I // 128, ceil_div(H, 128)
    return Launch(
        _expert_chain_kernel, (programs,),
        code_tiles(w13.view(E * N, H), 128), code_tiles(w2.view(E * H, I), 128),
        code_tiles(a, rows), scale_columns(a_s, SCALES.value),
        code_tiles(hidden, rows), scale_columns(hidden_s, SCALES.value),
        sf13, sf2, c13, c2, hidden.view(torch.uint8), hidden_s, out, routing.order, slot_weights,
        routing.tiles, routing.num_tiles, routing.progress, gated_n, ceil_div(H, 256), H, gated_NK,
        sf13.stride(0), sf13.stride(1), sf2.stride(0), sf2.stride(1), hidden_s.stride(1),
        TOKENS=rows, STAGES=stages, BLOCKS=1 << (max(gated_n, gated_NK) - 1).bit_length(),
        UE8M0=ue8m0, FLOOR=floor, DTYPE=getattr(gl, str(dtype).removeprefix("torch.")),
        WARPS=CHAIN_WARPS, num_warps=CHAIN_WARPS, launch_pdl=True, **FMA,
        maxnreg=CHAIN_REGISTERS,
    )  # fmt: skip
