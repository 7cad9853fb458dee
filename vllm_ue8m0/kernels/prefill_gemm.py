"""Product of many rows on sm_90: out [M, N] = a [M, K] @ w [N, K]^T, limited by the tensor cores.

a    [M, K] e4m3 with a_s [M, K/128] uint8 or float32, column-major (hopper.column_major)
w    [N, K] e4m3 with sf [N/128, K/128] uint8 or float32;  c [N/128] float32, bias [N] or None
out  [M, N] bf16/fp16/fp32. Rows of codes are multiples of 16 bytes.

Persistent and warp-specialized: one warp copies blocks of a, of its scales and of w into a ring,
across tiles, so that the next tile's blocks come while this one's result is written; two
warpgroups multiply, each half of the tile's rows. They issue products in turn: left alone, both
queues mix in the tensor cores and end together, which then idle while both add. H100, 2026-11-23,
8192^3: 794 us for 843. So nothing may wait between the instructions of one product: scales are read
before, where that is not slower.
256-row tiles: a warpgroup has two products of 64 rows. 128-row tiles: two blocks of K, the second
product running while the first is added, which fills the SMs better.

The sum is that of decode_gemm (there: order, range of scales). With SPLITS > 1 parts of K are
added in order by the last warpgroup of a tile to end.
"""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..layouts import ceil_div
from .config import FMA
from .hopper import (
    add_parts,
    add_scaled_rows,
    code_tiles,
    copy_to_shared,
    float_scale,
    half_tiles,
    next_stage,
    pass_turn,
    reinterpret,
    scale_columns,
    start_dependents,
    store_rows,
    take_turn,
    wait_for_inputs,
)
from .hopper_config import PrefillConfig, prefill_stages
from .replay import Launch, Scratch, launched

# Row tiles that share columns of w in L2. H100, 2026-11-23: 4, 8 and 16 are within 3 % of each
# other but for (24576, 1536), M = 8192: 16 is 9 % slower than 8.
GROUP_M = 8
# A warpgroup's registers, the producer's, and what a thread gets at launch: 168 * 12 warps are
# 232 * 8 + 40 * 4 (kernels are compiled for 3 groups of 4 warps, though the producer is one warp).
MATH_REGISTERS, COPY_REGISTERS, REGISTERS = 232, 40, 168


@gluon.jit
def _unit(unit, tiles_m, tiles_n, GROUP_M: gl.constexpr, SPLITS: gl.constexpr):
    """Work unit -> (row tile, column tile, part of K); bands of GROUP_M row tiles."""
    tile = unit // SPLITS
    band = tile // (GROUP_M * tiles_n)
    within = tile % (GROUP_M * tiles_n)
    height = gl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    return band * GROUP_M + within % height, within // height, unit % SPLITS


@gluon.jit
def _blocks(split, NK, BLOCK_M: gl.constexpr, SPLITS: gl.constexpr):
    """First and past-the-end block of a part; tiles of 128 rows take them in pairs."""
    STEP: gl.constexpr = 1 if BLOCK_M == 256 else 2
    steps = gl.cdiv(NK, STEP)
    return split * steps // SPLITS * STEP, (split + 1) * steps // SPLITS * STEP


@gluon.jit
def _copy(
    a_desc, as_desc, w_desc, a_smem, as_smem, w_smem, ready, empty, tiles_m, tiles_n, NK,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    A_BYTES: gl.constexpr = a_desc.block_type.nbytes + as_desc.block_type.nbytes
    nbytes: gl.constexpr = A_BYTES + w_desc.block_type.nbytes
    # Weights do not depend on the kernels before this one: the first ring of them starts at once.
    m, n, split = _unit(gl.program_id(0), tiles_m, tiles_n, GROUP_M, SPLITS)
    first, past = _blocks(split, NK, BLOCK_M, SPLITS)
    early = gl.minimum(past - first, STAGES)
    for i in range(early):
        mbarrier.expect(ready.index(i), nbytes)
        column = (first + i) * 128
        copy_to_shared(w_desc, [n * BLOCK_N, column], ready.index(i), w_smem.index(i))
    wait_for_inputs()
    start_dependents()
    stage, phase, done = 0, 1, 0
    for unit in range(gl.program_id(0), tiles_m * tiles_n * SPLITS, gl.num_programs(0)):
        m, n, split = _unit(unit, tiles_m, tiles_n, GROUP_M, SPLITS)
        first, past = _blocks(split, NK, BLOCK_M, SPLITS)
        for k in range(first, past):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            late = done >= early
            mbarrier.expect(bar, nbytes, pred=late)
            copy_to_shared(w_desc, [n * BLOCK_N, k * 128], bar, w_smem.index(stage), pred=late)
            copy_to_shared(a_desc, [m * BLOCK_M, k * 128], bar, a_smem.index(stage))
            copy_to_shared(as_desc, [k, m * BLOCK_M], bar, as_smem.index(stage))
            done += 1
            stage, phase = next_stage(stage, phase, 1, STAGES)


@gluon.jit
def _multiply(
    sf, c, bias, out, out_desc, partial, counters, a_smem, as_smem, w_smem, out_smem, ready, empty,
    tiles_m, tiles_n, M, N, NK, stride_sf,
    WG: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: its half of each tile's rows, in one or two waves of 64."""
    BLOCK_M: gl.constexpr = a_smem.shape[1]
    BLOCK_N: gl.constexpr = w_smem.shape[1]
    WAVES: gl.constexpr = BLOCK_M // 128
    ROW: gl.constexpr = WG * (BLOCK_M // 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = reinterpret(as_smem, as_smem.dtype, [STAGES * 2 * WAVES, 64], line)
    wait_for_inputs()
    stage, phase = 0, 0
    if WG == 1:
        pass_turn(WG)
    # Products go to registers that stay theirs: new zeros for each would be moved and spilled.
    raw0 = gl.zeros([64, BLOCK_N], gl.float32, mma)
    raw1 = gl.zeros([64, BLOCK_N], gl.float32, mma)
    for unit in range(gl.program_id(0), tiles_m * tiles_n * SPLITS, gl.num_programs(0)):
        m, n, split = _unit(unit, tiles_m, tiles_n, GROUP_M, SPLITS)
        first, past = _blocks(split, NK, BLOCK_M, SPLITS)
        ws = sf + n * BLOCK_N // 128 * stride_sf
        acc0 = gl.zeros([64, BLOCK_N], gl.float32, mma)
        acc1 = gl.zeros([64, BLOCK_N], gl.float32, mma)
        ws0 = gl.load(ws + first)
        ws1 = gl.load(ws + gl.minimum(first + 1, NK - 1))
        if WAVES == 2:
            mbarrier.wait(ready.index(stage), phase)
            as0 = scales.index(stage * 4 + WG * 2).load(rows)
            as1 = scales.index(stage * 4 + WG * 2 + 1).load(rows)
            for k in range(first, past):
                scale = float_scale(ws0)
                ws0 = gl.load(ws + gl.minimum(k + 1, NK - 1))
                a = a_smem.index(stage)
                w = w_smem.index(stage).permute((1, 0))
                f0 = float_scale(as0) * scale
                f1 = float_scale(as1) * scale
                take_turn(WG)
                token = warpgroup_mma(a.slice(ROW, 64), w, raw0, use_acc=False, is_async=True)
                pass_turn(WG)
                raw0 = warpgroup_mma_wait(0, deps=[token])
                acc0 = add_scaled_rows(raw0, f0, acc0)
                # Waiting again pins the FMAs here. LLVM would sink them behind the next product:
                # two products live, 66 spilled registers, 20 % slower (Triton 3.6).
                raw0, acc0 = warpgroup_mma_wait(0, deps=[raw0, acc0])
                take_turn(WG)
                token = warpgroup_mma(a.slice(ROW + 64, 64), w, raw0, use_acc=False, is_async=True)
                pass_turn(WG)
                used = empty.index(stage)
                stage, phase = next_stage(stage, phase, 1, STAGES)
                mbarrier.wait(ready.index(stage), phase, pred=k + 1 < past)
                as0 = scales.index(stage * 4 + WG * 2).load(rows)
                as1 = scales.index(stage * 4 + WG * 2 + 1).load(rows)
                raw0 = warpgroup_mma_wait(0, deps=[token])
                mbarrier.arrive(used, count=1)
                acc1 = add_scaled_rows(raw0, f1, acc1)
                raw0, acc1 = warpgroup_mma_wait(0, deps=[raw0, acc1])
        else:
            for k in range(first, past, 2):
                scale0 = float_scale(ws0)
                scale1 = float_scale(ws1)
                ws0 = gl.load(ws + gl.minimum(k + 2, NK - 1))
                ws1 = gl.load(ws + gl.minimum(k + 3, NK - 1))
                mbarrier.wait(ready.index(stage), phase)
                a = a_smem.index(stage).slice(ROW, 64)
                w = w_smem.index(stage).permute((1, 0))
                as0 = scales.index(stage * 2 + WG)
                if BLOCK_N == 128:  # 3 % faster than below; narrower tiles are slower so
                    f0 = float_scale(as0.load(rows)) * scale0
                take_turn(WG)
                token0 = warpgroup_mma(a, w, raw0, use_acc=False, is_async=True)
                if BLOCK_N < 128:
                    f0 = float_scale(as0.load(rows)) * scale0
                mbarrier.wait(ready.index(stage + 1), phase)
                a = a_smem.index(stage + 1).slice(ROW, 64)
                w = w_smem.index(stage + 1).permute((1, 0))
                token1 = warpgroup_mma(a, w, raw1, use_acc=False, is_async=True)
                pass_turn(WG)
                f1 = float_scale(scales.index(stage * 2 + 2 + WG).load(rows)) * scale1
                raw0 = warpgroup_mma_wait(1, deps=[token0])
                acc0 = add_scaled_rows(raw0, f0, acc0)
                raw1 = warpgroup_mma_wait(0, deps=[token1])
                mbarrier.arrive(empty.index(stage), count=1)
                mbarrier.arrive(empty.index(stage + 1), count=1)
                acc0 = add_scaled_rows(raw1, f1, acc0)
                stage, phase = next_stage(stage, phase, 2, STAGES)
        row = m * BLOCK_M + ROW
        smem = out_smem.index(WG)
        last = True
        if SPLITS > 1:
            spot = (m * tiles_n + n) * 2 + WG
            SIZE: gl.constexpr = 64 * BLOCK_N
            lane = gl.expand_dims(gl.arange(0, 64, rows), 1)
            column = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma)), 0)
            parts = partial + spot.to(gl.int64) * (SPLITS * SIZE) + lane * BLOCK_N + column
            last, acc0 = add_parts(acc0, parts, counters + spot, split, SPLITS, SIZE)
        if last:
            store_rows(acc0, c, bias, out, out_desc, smem, row, n * BLOCK_N, M, N, mma)
            if WAVES == 2:
                store_rows(acc1, c, bias, out, out_desc, smem, row + 64, n * BLOCK_N, M, N, mma)
    if WG == 0:
        take_turn(WG)  # the last pass
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "NK"])
def _prefill_gemm_kernel(
    a_desc, as_desc, w_desc, out_desc, sf, c, bias, out, partial, counters, M, N, NK, stride_sf,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, SPLITS: gl.constexpr,
    MATH_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], a_desc.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, 128], w_desc.layout)
    as_smem = gl.allocate_shared_memory(as_desc.dtype, [STAGES, 1, BLOCK_M], as_desc.layout)
    if out_desc is not None:
        shape: gl.constexpr = [2, 64, out_desc.block_type.shape[1]]
        out_smem = gl.allocate_shared_memory(out_desc.dtype, shape, out_desc.layout)
    else:
        out_smem = a_smem  # not used
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    # A loop over K that may not run at all spills accumulators.
    gl.assume(NK > 0)
    gl.warp_specialize(
        [
            (_multiply, (
                sf, c, bias, out, out_desc, partial, counters,
                a_smem, as_smem, w_smem, out_smem, ready, empty,
                tiles_m, tiles_n, M, N, NK, stride_sf, 0, STAGES, GROUP_M, SPLITS,
            )),
            (_multiply, (
                sf, c, bias, out, out_desc, partial, counters,
                a_smem, as_smem, w_smem, out_smem, ready, empty,
                tiles_m, tiles_n, M, N, NK, stride_sf, 1, STAGES, GROUP_M, SPLITS,
            )),
            (_copy, (
                a_desc, as_desc, w_desc, a_smem, as_smem, w_smem, ready, empty,
                tiles_m, tiles_n, NK, STAGES, GROUP_M, SPLITS,
            )),
        ],
        [4, 1],
        [MATH_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, c: torch.Tensor | None,
    bias: torch.Tensor | None, out: torch.Tensor, config: PrefillConfig,
    counters: torch.Tensor | None, sms: int,
) -> Launch:  # fmt: skip
    """counters: as decode_gemm's, two for each tile."""
    (M, K), N, splits = a.shape, w.shape[0], config.splits
    block_m, block_n = config.block_m, config.block_n
    stages, width = prefill_stages(config, a_s.element_size())
    out_desc = None
    if out.dtype != torch.float32 and N % 8 == 0:  # rows of multiples of 16 bytes
        out_desc = half_tiles(out, 64, width)
    tiles, partial = ceil_div(M, block_m) * ceil_div(N, block_n), None
    if splits > 1:
        size = tiles * splits * block_m * block_n
        partial = Scratch(size)
    return Launch(
        _prefill_gemm_kernel, (min(sms, tiles * splits),),
        code_tiles(a, block_m), scale_columns(a_s, block_m), code_tiles(w, block_n), out_desc,
        sf, c, bias, out, partial, counters, M, N, ceil_div(K, 128), sf.stride(0),
        STAGES=stages, GROUP_M=GROUP_M, SPLITS=splits,
        MATH_REGISTERS=MATH_REGISTERS, COPY_REGISTERS=COPY_REGISTERS,
        num_warps=4, maxnreg=REGISTERS, launch_pdl=True, **FMA,
    )  # fmt: skip
