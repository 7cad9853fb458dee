"""Experts' products of one token, or of few rows in the batched format, on sm_90.

They are limited by reading weights. Operands, GATED and rounding are expert_prefill's; sums and
swap-AB are decode_gemm's: BLOCK_N rows of w to TOKENS rows of a tile. A stage of the ring is one
block of K of gate and of up, or two blocks of K. Of TOPK > 0 slots of one token every slot is a
tile and nothing is sorted:

GATED    the token x is quantized by every program, in its part of K
else     combined [N] is the sum of the products, in order, by the last program of a column tile

SPLITS divide K of one token's gated products; the last program to end adds the parts in order.
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
from .expert_config import Product, part_blocks, registers
from .expert_load import copy_weights, part, quantize_token, unit_tile, weight_scales
from .expert_store import store_columns, store_gated, sum_slots
from .hopper import (
    barrier,
    code_tiles,
    copy_to_shared,
    float_scale,
    next_stage,
    reinterpret,
    scale_columns,
    start_dependents,
    wait_for_inputs,
)
from .replay import Launch, Scratch, launched
from .route import Tiles

SCALES = 128  # copied of a block of K: what shared memory of the copy engine is aligned to


@gluon.jit
def _copy(
    w_desc, a_desc, as_desc, tiles, num_tiles, ids, expert_map,
    w_smem, a_smem, as_smem, ready, empty, tiles_n, num_experts, num_global, N, NK,
    STAGES: gl.constexpr, SPLITS: gl.constexpr, GATED: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    FUSED: gl.constexpr = a_desc is None
    STEP: gl.constexpr = 1 if GATED else 2
    A_BYTES: gl.constexpr = 0 if FUSED else a_desc.block_type.nbytes + as_desc.block_type.nbytes
    nbytes: gl.constexpr = 2 * w_desc.block_type.nbytes + STEP * A_BYTES
    early = 0
    if GATED:
        wait_for_inputs()
    units = (TOPK if TOPK > 0 else gl.load(num_tiles)) * tiles_n * SPLITS
    if not GATED:
        # What routed ended before the gated product that let this kernel start.
        if gl.program_id(0) < units:
            unit = gl.program_id(0)
            expert, _, _, _, n, split = unit_tile(
                unit, tiles, ids, expert_map, tiles_n, num_experts, num_global, SPLITS, TOPK
            )  # fmt: skip
            if expert >= 0:
                first, steps = part(split, NK, SPLITS, STEP)
                early = gl.minimum(steps, STAGES)
                for i in range(early):
                    mbarrier.expect(ready.index(i), nbytes)
                    bar, k = ready.index(i), first + i * STEP
                    copy_weights(w_desc, w_smem, bar, i, expert, n, k, N, True, GATED)
        wait_for_inputs()
    stage, phase, done = 0, 1, 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, row, _, scale_row, n, split = unit_tile(
            unit, tiles, ids, expert_map, tiles_n, num_experts, num_global, SPLITS, TOPK
        )  # fmt: skip
        if expert >= 0:
            first, steps = part(split, NK, SPLITS, STEP)
            for i in range(steps):
                k = first + i * STEP
                bar = ready.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                late = done >= early
                mbarrier.expect(bar, nbytes, pred=late)
                copy_weights(w_desc, w_smem, bar, stage, expert, n, k, N, late, GATED)
                if not FUSED:
                    for j in gl.static_range(STEP):
                        slot = stage * STEP + j
                        copy_to_shared(a_desc, [row, (k + j) * 128], bar, a_smem.index(slot))
                        copy_to_shared(as_desc, [k + j, scale_row], bar, as_smem.index(slot))
                done += 1
                stage, phase = next_stage(stage, phase, 1, STAGES)


@gluon.jit
def _multiply(
    x, sf, c, out, out_s, slot_weights, tiles, num_tiles, ids, expert_map, combined, partial,
    counters, w_smem, a_smem, as_smem, ws_smem, ready, empty,
    tiles_n, num_experts, num_global, N, K, NK, stride_se, stride_sn, stride_os,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, BLOCKS: gl.constexpr,
    GATED: gl.constexpr, TOPK: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = w_smem.shape[1]
    FUSED: gl.constexpr = GATED and TOPK > 0
    STEP: gl.constexpr = 1 if GATED else 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 32])
    along: gl.constexpr = gl.SliceLayout(0, mma)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ws_each = reinterpret(ws_smem, gl.float32, [4 * BLOCKS, 1], line)
    # A block's scales: row r of a_s is at r * SKIP.
    SKIP: gl.constexpr = 1 if FUSED else 128 // TOKENS
    LINES: gl.constexpr = BLOCKS if FUSED else STAGES * STEP * SKIP
    scales = reinterpret(as_smem, as_smem.dtype, [LINES, TOKENS], line)
    wait_for_inputs()
    start_dependents()
    units = (TOPK if TOPK > 0 else gl.load(num_tiles)) * tiles_n * SPLITS
    nearest = gl.minimum(gl.program_id(0), gl.maximum(units - 1, 0))
    expert, _, _, _, n, split = unit_tile(
        nearest, tiles, ids, expert_map, tiles_n, num_experts, num_global, SPLITS, TOPK
    )  # fmt: skip
    # Without any tile this one is not defined.
    expert = gl.minimum(expert, num_experts - 1)
    first, _ = part(split, NK, SPLITS, STEP)
    if FUSED:
        quantize_token(x, a_smem, as_smem, K, first, TOKENS, BLOCKS, UE8M0, FLOOR, WARPS)
    s0, s1 = weight_scales(
        sf, expert, n, first, NK, N, stride_se, stride_sn, BLOCK_N, BLOCKS, GATED, WARPS
    )
    ws_smem.index(0).store(float_scale(s0))
    ws_smem.index(1).store(float_scale(s1))
    barrier()
    stage, phase, side = 0, 0, 0
    raw0 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
    raw1 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, row, end, scale_row, n, split = unit_tile(
            unit, tiles, ids, expert_map, tiles_n, num_experts, num_global, SPLITS, TOPK
        )  # fmt: skip
        first, steps = part(split, NK, SPLITS, STEP)
        # The next unit's weight scales reach shared memory while this one multiplies.
        following = gl.minimum(unit + gl.num_programs(0), units - 1)
        expert1, _, _, _, n1, split1 = unit_tile(
            following, tiles, ids, expert_map, tiles_n, num_experts, num_global, SPLITS, TOPK
        )  # fmt: skip
        first1, _ = part(split1, NK, SPLITS, STEP)
        s0, s1 = weight_scales(
            sf, expert1, n1, first1, NK, N, stride_se, stride_sn, BLOCK_N, BLOCKS, GATED, WARPS
        )
        acc0 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
        acc1 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
        if expert >= 0:
            for i in range(steps):
                mbarrier.wait(ready.index(stage), phase)
                slot = i if FUSED else stage * STEP
                other = slot + STEP - 1
                token0 = warpgroup_mma(
                    w_smem.index(2 * stage), a_smem.index(slot).permute((1, 0)), raw0,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                token1 = warpgroup_mma(
                    w_smem.index(2 * stage + 1), a_smem.index(other).permute((1, 0)), raw1,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                f0 = float_scale(scales.index(slot * SKIP).load(along))
                spot = side * 2 * BLOCKS + i * STEP
                if GATED:
                    f1 = f0 * ws_each.index(spot + BLOCKS).load(along)
                else:
                    f1 = float_scale(scales.index((slot + 1) * SKIP).load(along))
                    f1 *= ws_each.index(spot + 1).load(along)
                f0 *= ws_each.index(spot).load(along)
                raw0 = warpgroup_mma_wait(1, deps=[token0])
                acc0 = gl.fma(raw0, gl.expand_dims(f0, 0).broadcast_to(acc0.shape), acc0)
                raw1 = warpgroup_mma_wait(0, deps=[token1])
                mbarrier.arrive(empty.index(stage), count=1)
                if GATED:
                    acc1 = gl.fma(raw1, gl.expand_dims(f1, 0).broadcast_to(acc0.shape), acc1)
                else:
                    acc0 = gl.fma(raw1, gl.expand_dims(f1, 0).broadcast_to(acc0.shape), acc0)
                stage, phase = next_stage(stage, phase, 1, STAGES)
        side = side ^ 1
        ws_smem.index(2 * side).store(float_scale(s0))
        ws_smem.index(2 * side + 1).store(float_scale(s1))
        if GATED:
            if expert >= 0:
                store_gated(
                    acc0, acc1, c, out, out_s, partial, counters, expert, row, end,
                    scale_row, n, unit // SPLITS, split, N, stride_os,
                    BLOCK_N, TOKENS, SPLITS, UE8M0, FLOOR, DTYPE, WARPS, mma,
                )  # fmt: skip
        else:
            if expert >= 0:
                store_columns(
                    acc0, c, out, None, slot_weights, expert, row, end, n, N,
                    BLOCK_N, TOKENS, WARPS,
                )  # fmt: skip
            if TOPK > 0:
                sum_slots(
                    out, ids, expert_map, combined, counters + n, n, num_experts, num_global, N,
                    BLOCK_N, TOPK, WARPS,
                )  # fmt: skip
        barrier()


@gluon.jit(do_not_specialize=["NK"])
def _expert_decode_kernel(
    w_desc, a_desc, as_desc, x, sf, c, out, out_s, slot_weights, tiles, num_tiles, ids,
    expert_map, combined, partial, counters, num_experts, num_global, N, K, NK,
    stride_se, stride_sn, stride_os,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, BLOCKS: gl.constexpr,
    GATED: gl.constexpr, TOPK: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """BLOCKS: a power of two, at least a part's blocks of K."""
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    FUSED: gl.constexpr = GATED and TOPK > 0
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, 128], gl.float8e4nv)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    A_TILES: gl.constexpr = BLOCKS if FUSED else STAGES * (1 if GATED else 2)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, BLOCK_N, 128], w_desc.layout)
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [A_TILES, TOKENS, 128], a_layout)
    if FUSED:
        as_smem = gl.allocate_shared_memory(gl.float32, [BLOCKS, TOKENS], line)
    else:
        as_smem = gl.allocate_shared_memory(as_desc.dtype, [A_TILES, 1, 128], as_desc.layout)
    ws_smem = gl.allocate_shared_memory(gl.float32, [4, BLOCKS], line)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    tiles_n = gl.cdiv(N, (2 if GATED else 1) * BLOCK_N)
    gl.warp_specialize(
        [
            (_multiply, (
                x, sf, c, out, out_s, slot_weights, tiles, num_tiles, ids, expert_map,
                combined, partial, counters, w_smem, a_smem, as_smem, ws_smem, ready, empty,
                tiles_n, num_experts, num_global, N, K, NK, stride_se, stride_sn, stride_os,
                TOKENS, STAGES, SPLITS, BLOCKS, GATED, TOPK, UE8M0, FLOOR, DTYPE, WARPS,
            )),
            (_copy, (
                w_desc, a_desc, as_desc, tiles, num_tiles, ids, expert_map,
                w_smem, a_smem, as_smem, ready, empty, tiles_n, num_experts, num_global, N, NK,
                STAGES, SPLITS, GATED, TOPK,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, out: torch.Tensor, out_s: torch.Tensor | None, *,
    routing: Tiles | None, ids: torch.Tensor | None, expert_map: torch.Tensor | None,
    slot_weights: torch.Tensor | None, combined: torch.Tensor | None,
    counters: torch.Tensor | None, rows: int, config: Product, ue8m0: bool, floor: int,
    dtype: torch.dtype,
) -> Launch:  # fmt: skip
    """Gated if out_s is given. Either tiles of `rows` rows, without order; or one token's ids
    [TOPK], with the token as a (gated), or with combined.

    counters int32 zeros, of one token: one for each slot and column tile of a gated product that is
    divided, one for each column tile if there is combined.
    """
    E, N, K = w.shape
    NK, gated = ceil_div(K, 128), out_s is not None
    block_n, splits = config.block_n, config.splits
    warps, fused = config.warps, gated and ids is not None
    blocks = part_blocks(NK, 1 if gated else 2, splits)
    tiles = num_tiles = partial = None
    if routing is not None:
        assert routing.order is None, "results go to the rows they come from"
        tiles, num_tiles = routing.tiles, routing.num_tiles
    topk = 0 if ids is None else ids.numel()
    if splits > 1:
        assert topk, f"{splits=} of sorted rows"
        size = topk * ceil_div(N, 2 * block_n) * splits * 2 * block_n
        partial = Scratch(size)
    return Launch(
        _expert_decode_kernel, (config.programs,),
        code_tiles(w.view(E * N, K), block_n), None if fused else code_tiles(a, rows),
        None if a_s is None else scale_columns(a_s, SCALES), a if fused else None, sf, c,
        out.view(torch.uint8) if gated else out, out_s, slot_weights, tiles, num_tiles, ids,
        expert_map, combined, partial, counters, E,
        0 if expert_map is None else len(expert_map), N, K, NK, sf.stride(0), sf.stride(1),
        0 if out_s is None else out_s.stride(1),
        TOKENS=rows, STAGES=config.stages, SPLITS=splits, BLOCKS=blocks, GATED=gated, TOPK=topk,
        UE8M0=ue8m0, FLOOR=floor, DTYPE=getattr(gl, str(dtype).removeprefix("torch.")),
        WARPS=warps, num_warps=warps, launch_pdl=True, **FMA,
        maxnreg=registers(rows),
    )  # fmt: skip
