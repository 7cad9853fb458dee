"""Experts' products of many rows on sm_90, limited by the tensor cores or by reading weights.

a        [rows, K] e4m3 sorted by expert, with a_s [rows, K/128] column-major uint8 or float32
w        [E, N, K] e4m3 contiguous with sf [E, N/128, K/128];  c [E, N/128] float32 or None
tiles    see route.py: an expert's rows and their scales for each tile of 128

GATED    N = 2 I, gate rows first: out = silu(gate) * up of [rows, I], quantized: e4m3 codes and
         scales out_s [rows, I/128] column-major. Rounded to `dtype` where the steps one by one
         round: gate, up, silu(gate), their product.
else     out [slots, N], a row times its slot's weight, at the row's slot (order), or at the row

The loop is prefill_gemm's for 256 x 128 (there: turns, reading scales ahead, pinned FMAs), but
with two tiles of w for one of a: gate and up of the same columns, or neighbours. Of a tile
of at most 64 rows each warpgroup has one tile of w; up reaches the first through shared memory.

An expert's tiles that are multiplied at the same time read w from memory once, if they keep pace:
L2 holds few blocks of K of all that is read at once. Programs that take every 132nd unit drift
apart; so units are taken in order, by whatever program is ready. H100, 2026-11-23, 8,192 tokens,
256 experts of 2048: 7.1 ms the layer for 10.7.
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
from .expert_config import PREFILL_ROWS
from .expert_load import copy_ordered, ordered_unit
from .expert_store import store_hidden, store_tile
from .hopper import (
    add_scaled_rows,
    code_tiles,
    float_scale,
    next_stage,
    pass_turn,
    reinterpret,
    scale_columns,
    take_turn,
    wait_for_inputs,
)
from .prefill_gemm import COPY_REGISTERS, MATH_REGISTERS, REGISTERS
from .replay import Launch, launched
from .route import Tiles

STAGES = 4


@gluon.jit
def _multiply(
    sf, c, out, out_s, order, slot_weights, tiles, num_tiles,
    a_smem, as_smem, w_smem, next_smem, up_smem, ready, empty,
    tiles_n, N, NK, stride_se, stride_sn, stride_os,
    WG: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, UE8M0: gl.constexpr,
    FLOOR: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: half of a tile's rows or, of at most 64, half of the columns."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scales = reinterpret(as_smem, as_smem.dtype, [STAGES * 2, 64], line)
    wait_for_inputs()
    units = gl.load(num_tiles) * tiles_n
    stage, phase = 0, 0
    if WG == 1:
        pass_turn(WG)
    raw = gl.zeros([64, 128], gl.float32, mma)
    unit = gl.program_id(0)
    if unit < units:
        expert, row, end, scale_row, n = ordered_unit(unit, units, tiles, tiles_n)
    else:
        expert, row, end, scale_row, n = 0, 0, 0, 0, 0
    while unit < units:
        if GATED:
            block0 = n
            block1 = N // 256 + n
        else:
            block0 = 2 * n
            block1 = gl.minimum(2 * n + 1, (N - 1) // 128)
        ws0 = sf + expert.to(gl.int64) * stride_se + block0 * stride_sn
        ws1 = sf + expert.to(gl.int64) * stride_se + block1 * stride_sn
        next0 = gl.load(ws0)
        next1 = gl.load(ws1)
        if c is not None:
            factors = c + expert * ((N + 127) // 128)
        acc0 = gl.zeros([64, 128], gl.float32, mma)
        acc1 = gl.zeros([64, 128], gl.float32, mma)
        mbarrier.wait(ready.index(stage), phase)
        following = gl.max(next_smem.index(stage).load(one), 0)
        expert1, row1, end1, scale_row1, n1 = ordered_unit(following, units, tiles, tiles_n)
        if end - row > 64:  # each warpgroup has 64 rows
            row += WG * 64
            scale_row += WG * 64
            scale = scales.index(stage * 2 + WG).load(rows)
            for k in range(NK):
                f = float_scale(scale)
                f0 = f * float_scale(next0)
                f1 = f * float_scale(next1)
                ahead = gl.minimum(k + 1, NK - 1)
                next0 = gl.load(ws0 + ahead)
                next1 = gl.load(ws1 + ahead)
                a = a_smem.index(stage).slice(WG * 64, 64)
                take_turn(WG)
                token = warpgroup_mma(
                    a, w_smem.index(2 * stage).permute((1, 0)), raw, use_acc=False, is_async=True
                )
                pass_turn(WG)
                raw = warpgroup_mma_wait(0, deps=[token])
                acc0 = add_scaled_rows(raw, f0, acc0)
                raw, acc0 = warpgroup_mma_wait(0, deps=[raw, acc0])
                take_turn(WG)
                token = warpgroup_mma(
                    a, w_smem.index(2 * stage + 1).permute((1, 0)), raw,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                pass_turn(WG)
                used = empty.index(stage)
                stage, phase = next_stage(stage, phase, 1, STAGES)
                mbarrier.wait(ready.index(stage), phase, pred=k + 1 < NK)
                scale = scales.index(stage * 2 + WG).load(rows)
                raw = warpgroup_mma_wait(0, deps=[token])
                mbarrier.arrive(used, count=1)
                acc1 = add_scaled_rows(raw, f1, acc1)
                raw, acc1 = warpgroup_mma_wait(0, deps=[raw, acc1])
            if c is not None:
                acc0 *= gl.load(factors + block0)
                acc1 *= gl.load(factors + block1)
            if GATED:
                store_hidden(
                    acc0, acc1, out, out_s, row, scale_row, end, n, N, stride_os,
                    UE8M0, FLOOR, DTYPE, mma,
                )  # fmt: skip
            else:
                store_tile(acc0, out, order, slot_weights, row, end, n * 256, N, mma, 8)
                store_tile(acc1, out, order, slot_weights, row, end, n * 256 + 128, N, mma, 8)
        else:  # each has one tile of w
            scale = scales.index(stage * 2).load(rows)
            for k in range(NK):
                f = float_scale(scale) * float_scale(next1 if WG == 1 else next0)
                ahead = gl.minimum(k + 1, NK - 1)
                next0 = gl.load(ws0 + ahead)
                next1 = gl.load(ws1 + ahead)
                token = warpgroup_mma(
                    a_smem.index(stage).slice(0, 64), w_smem.index(2 * stage + WG).permute((1, 0)),
                    raw, use_acc=False, is_async=True,
                )  # fmt: skip
                used = empty.index(stage)
                stage, phase = next_stage(stage, phase, 1, STAGES)
                mbarrier.wait(ready.index(stage), phase, pred=k + 1 < NK)
                scale = scales.index(stage * 2).load(rows)
                raw = warpgroup_mma_wait(0, deps=[token])
                mbarrier.arrive(used, count=1)
                acc0 = add_scaled_rows(raw, f, acc0)
                raw, acc0 = warpgroup_mma_wait(0, deps=[raw, acc0])
            if c is not None:
                acc0 *= gl.load(factors + (block1 if WG == 1 else block0))
            if GATED:
                take_turn(WG)
                if WG == 1:
                    up_smem.store(acc0.to(DTYPE))  # as silu_mul rounds it
                pass_turn(WG)
                take_turn(WG)
                if WG == 0:
                    up = up_smem.load(mma).to(gl.float32)
                    store_hidden(
                        acc0, up, out, out_s, row, scale_row, end, n, N, stride_os,
                        UE8M0, FLOOR, DTYPE, mma,
                    )  # fmt: skip
                pass_turn(WG)
            else:
                column = n * 256 + WG * 128
                store_tile(acc0, out, order, slot_weights, row, end, column, N, mma, 8)
        unit, expert, row, end, scale_row, n = following, expert1, row1, end1, scale_row1, n1
    if WG == 0:
        take_turn(WG)  # the last pass


@gluon.jit(do_not_specialize=["NK"])
def _expert_prefill_kernel(
    a_desc, as_desc, w_desc, sf, c, out, out_s, order, slot_weights, tiles, num_tiles, counter,
    N, NK, stride_se, stride_sn, stride_os,
    STAGES: gl.constexpr, GATED: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    DTYPE: gl.constexpr, MATH_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], a_desc.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 128, 128], w_desc.layout)
    as_smem = gl.allocate_shared_memory(as_desc.dtype, [STAGES, 1, 128], as_desc.layout)
    next_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    if GATED:  # its swizzle: eight rows of 16 bytes each lie in different banks
        up_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        up_smem = gl.allocate_shared_memory(DTYPE, [64, 128], up_layout)
    else:
        up_smem = next_smem  # not used
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_n = gl.cdiv(N, 256)
    gl.assume(NK > 0)  # a loop over K that may not run at all spills accumulators
    gl.warp_specialize(
        [
            (_multiply, (
                sf, c, out, out_s, order, slot_weights, tiles, num_tiles,
                a_smem, as_smem, w_smem, next_smem, up_smem, ready, empty,
                tiles_n, N, NK, stride_se, stride_sn, stride_os,
                0, STAGES, GATED, UE8M0, FLOOR, DTYPE,
            )),
            (_multiply, (
                sf, c, out, out_s, order, slot_weights, tiles, num_tiles,
                a_smem, as_smem, w_smem, next_smem, up_smem, ready, empty,
                tiles_n, N, NK, stride_se, stride_sn, stride_os,
                1, STAGES, GATED, UE8M0, FLOOR, DTYPE,
            )),
            (copy_ordered, (
                a_desc, as_desc, w_desc, a_smem, as_smem, w_smem, next_smem, ready, empty, tiles,
                num_tiles, counter, tiles_n, N, NK, STAGES, GATED,
            )),
        ],
        [4, 1],
        [MATH_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, c: torch.Tensor | None,
    out: torch.Tensor, out_s: torch.Tensor | None, *, routing: Tiles,
    slot_weights: torch.Tensor | None, counter: torch.Tensor, ue8m0: bool, floor: int,
    dtype: torch.dtype, programs: int,
) -> Launch:  # fmt: skip
    """Gated if out_s is given. routing: to tiles of PREFILL_ROWS rows. counter [1] int32: zero."""
    (E, N, K), gated = w.shape, out_s is not None
    return Launch(
        _expert_prefill_kernel, (programs,),
        code_tiles(a, PREFILL_ROWS), scale_columns(a_s, PREFILL_ROWS),
        code_tiles(w.view(E * N, K), 128),
        sf, c, out.view(torch.uint8) if gated else out, out_s, None if gated else routing.order,
        slot_weights, routing.tiles, routing.num_tiles, counter, N, ceil_div(K, 128),
        sf.stride(0), sf.stride(1), 0 if out_s is None else out_s.stride(1),
        STAGES=STAGES, GATED=gated, UE8M0=ue8m0, FLOOR=floor,
        DTYPE=getattr(gl, str(dtype).removeprefix("torch.")),
        MATH_REGISTERS=MATH_REGISTERS, COPY_REGISTERS=COPY_REGISTERS,
        num_warps=4, maxnreg=REGISTERS, launch_pdl=True, **FMA,
    )  # fmt: skip
