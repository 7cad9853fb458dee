"""Product of few rows on sm_90: out [M, N] = a [M, K] @ w [N, K]^T, M <= 64, limited by reading w.

a    [M, K] e4m3 with a_s [M, K/128] uint8 or float32 of any strides; or x [M, K] bf16/fp16/fp32,
     which every program quantizes for itself (one kernel in place of two)
w    [N, K] e4m3 with sf [N/128, K/128] uint8 or float32;  c [N/128] float32, bias [N] or None
out  [M, N] bf16/fp16/fp32. Rows of codes are multiples of 16 bytes.

The weights are the tensor cores' first operand (swap-AB): 64 rows of them to 8, 16, 32 or 64
tokens. A program owns one of SPLITS parts of K and some tiles of rows, and streams them through a
ring of shared memory, two blocks of 128 of K a stage: the second product runs while the first is
added. The ring fills before the kernel waits for its inputs, so that weights are on their way
while the kernels before it end.

acc += raw * (scale of a * scale of w), one FMA per block of 128 in order of K: the sum of
prefill_gemm and of DeepGEMM. Parts are added in order by the last program of a tile to end; SPLITS
comes from N and K alone, so a row's result does not depend on M. The product of two scales is exact
from 2^-149; below, a block loses less than 2^-124; from 2^128 it is Inf (NaN times a zero).
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
from .hopper import (
    add_parts,
    barrier,
    code_tiles,
    column_major,
    copy_to_shared,
    float_scale,
    next_stage,
    quantize,
    reinterpret,
    start_dependents,
    wait_for_inputs,
)
from .hopper_config import DecodeConfig
from .replay import Launch, Scratch, launched


@gluon.jit
def _advance(tile, k, groups, blocks):
    """The stage after this one: along K, then in the program's next tile."""
    k += 2
    wrap = k == blocks
    return gl.where(wrap, tile + groups, tile), gl.where(wrap, 0, k)


@gluon.jit
def _copy_stage(desc, row, k, ready, smem, stage, pred):
    copy_to_shared(desc, [row, k * 128], ready, smem.index(2 * stage), pred=pred)
    copy_to_shared(desc, [row, k * 128 + 128], ready, smem.index(2 * stage + 1), pred=pred)


@gluon.jit
def _load_groups(x, row, column, M, K, stride_x, first, TOKENS: gl.constexpr):
    """Group first + row // TOKENS of token row % TOKENS, [ROWS, 128]; zeros past M and K."""
    token = gl.expand_dims(row % TOKENS, 1)
    k = gl.expand_dims((first + row // TOKENS) * 128, 1) + gl.expand_dims(column, 0)
    return gl.load(x + token * stride_x + k, mask=(token < M) & (k < K), other=0.0)


@gluon.jit
def _quantize_part(
    x, a_smem, as_smem, M, K, stride_x, first_k,
    TOKENS: gl.constexpr, BLOCKS: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """This part's groups of every token -> codes and scales in shared memory."""
    TOTAL: gl.constexpr = BLOCKS * TOKENS
    ROWS: gl.constexpr = TOTAL if TOTAL < 16 * WARPS else 16 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, 128, gl.SliceLayout(0, layout))
    # The swizzle repeats every 8 rows: tiles of TOKENS rows are rows of one tall tile.
    codes = reinterpret(a_smem, gl.float8e4nv, [TOTAL // ROWS, ROWS, 128], a_smem.layout)
    scales = reinterpret(as_smem, gl.float32, [TOTAL // ROWS, ROWS], as_smem.layout)
    loaded = _load_groups(x, row, column, M, K, stride_x, first_k, TOKENS)
    for i in range(TOTAL // ROWS):
        values = loaded.to(gl.float32)
        ahead = first_k + (i + 1) * (ROWS // TOKENS)
        loaded = _load_groups(x, row, column, M, K, stride_x, ahead, TOKENS)
        code, scale = quantize(values, UE8M0, FLOOR)
        codes.index(i).store(code)
        scales.index(i).store(scale)
    fence_async_shared()


@gluon.jit
def _load_scales(
    a_s, as_smem, M, NK, stride_am, stride_ak, first_k,
    TOKENS: gl.constexpr, BLOCKS: gl.constexpr, MN_MAJOR: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """This part's activation scales -> float32 in shared memory, [BLOCKS, TOKENS]."""
    # Lanes along the tokens: neighbours in shared memory and, if column-major, in memory, where
    # columns are padded to 16 bytes and whole words of four may be read.
    WIDE: gl.constexpr = 4 if MN_MAJOR and TOKENS >= 16 else 1
    LANES: gl.constexpr = TOKENS // WIDE if TOKENS < 32 * WIDE else 32
    layout: gl.constexpr = gl.BlockedLayout([1, WIDE], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    j = gl.expand_dims(gl.arange(0, BLOCKS, gl.SliceLayout(1, layout)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, layout)), 0)
    limit = gl.cdiv(M, WIDE) * WIDE
    # Where there is no block any more: 2^-127 or 0, times a product of zeros.
    used = (m < limit) & (first_k + j < NK)
    loaded = gl.load(a_s + m * stride_am + (first_k + j) * stride_ak, mask=used, other=0)
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    reinterpret(as_smem, gl.float32, [BLOCKS, TOKENS], rows).store(float_scale(loaded))


@gluon.jit(do_not_specialize=["M", "NK"])
def _decode_gemm_kernel(
    w_desc, a_desc, x, a_s, sf, c, bias, out, partial, counters,
    M, N, K, NK, stride_x, stride_am, stride_ak, stride_sf,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, BLOCKS: gl.constexpr,
    REFILL: gl.constexpr, MN_MAJOR: gl.constexpr, UE8M0: gl.constexpr, FLOOR: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """BLOCKS: a power of two, at least a part's blocks. REFILL: a stage is used more than once."""
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    FUSED: gl.constexpr = a_desc is None
    # A warpgroup multiplies 64 rows; more of them than there are rows for share the tokens.
    SHARES: gl.constexpr = WARPS // (BLOCK_N // 16)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [BLOCK_N // 16, SHARES], [16, TOKENS // SHARES, 32]
    )
    along_tokens: gl.constexpr = gl.SliceLayout(0, mma)
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, 128], gl.float8e4nv)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    A_TILES: gl.constexpr = BLOCKS if FUSED else 2 * STAGES
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, BLOCK_N, 128], w_desc.layout)
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [A_TILES, TOKENS, 128], a_layout)
    as_smem = gl.allocate_shared_memory(gl.float32, [BLOCKS, TOKENS], line)
    ws_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCKS], line)
    ws_each = reinterpret(ws_smem, gl.float32, [2 * BLOCKS, 1], line)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    group, split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    groups = gl.num_programs(0) // SPLITS
    pairs = gl.cdiv(NK, 2)
    first_k = split * pairs // SPLITS * 2
    blocks = (split + 1) * pairs // SPLITS * 2 - first_k
    tiles = gl.cdiv(N, BLOCK_N)
    total = (tiles - group + groups - 1) // groups * (blocks // 2)

    # Weight scales of two tiles, then always two ahead, and these before any weights: behind a ring
    # of those they come when all of it has, with the memory idle (docs/design.md has figures).
    block: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    sf += gl.minimum(first_k + gl.arange(0, BLOCKS, block), NK - 1)
    ws_first = gl.load(sf + group * BLOCK_N // 128 * stride_sf)
    second = gl.minimum(group + groups, tiles - 1)
    ws_following = gl.load(sf + second * BLOCK_N // 128 * stride_sf)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    nbytes: gl.constexpr = 2 * 128 * (BLOCK_N + (0 if FUSED else TOKENS))
    next_tile, next_k = group, 0
    for i in gl.static_range(STAGES):
        has = i < total
        mbarrier.expect(ready.index(i), nbytes, pred=has)
        _copy_stage(w_desc, next_tile * BLOCK_N, first_k + next_k, ready.index(i), w_smem, i, has)
        next_tile, next_k = _advance(next_tile, next_k, groups, blocks)
    if not FUSED:
        start_dependents()
    ws_smem.index(0).store(float_scale(ws_first))
    wait_for_inputs()

    if FUSED:
        # Later than above: the next kernel's programs would share the SMs while these quantize.
        # H100, 2026-11-23, us: (3072, 1536), M = 8: 4.6 here, 5.4 above; (512, 7168): 4.6, 5.8.
        start_dependents()
        _quantize_part(
            x, a_smem, as_smem, M, K, stride_x, first_k, TOKENS, BLOCKS, UE8M0, FLOOR, WARPS
        )  # fmt: skip
    else:
        k = 0
        for i in gl.static_range(STAGES):
            _copy_stage(a_desc, 0, first_k + k, ready.index(i), a_smem, i, i < total)
            _, k = _advance(0, k, 0, blocks)
        _load_scales(
            a_s, as_smem, M, NK, stride_am, stride_ak, first_k, TOKENS, BLOCKS, MN_MAJOR, WARPS
        )  # fmt: skip
    barrier()

    stage, phase, done, side = 0, 0, 0, 0
    raw0 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
    raw1 = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
    for tile in range(group, tiles, groups):
        acc = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
        later = gl.minimum(tile + 2 * groups, tiles - 1)
        ws_later = gl.load(sf + later * BLOCK_N // 128 * stride_sf)
        for k in range(0, blocks, 2):
            mbarrier.wait(ready.index(stage), phase)
            slot = k if FUSED else 2 * stage
            token0 = warpgroup_mma(
                w_smem.index(2 * stage), a_smem.index(slot).permute((1, 0)), raw0,
                use_acc=False, is_async=True,
            )  # fmt: skip
            token1 = warpgroup_mma(
                w_smem.index(2 * stage + 1), a_smem.index(slot + 1).permute((1, 0)), raw1,
                use_acc=False, is_async=True,
            )  # fmt: skip
            spot = side * BLOCKS + k
            f0 = as_smem.index(k).load(along_tokens) * ws_each.index(spot).load(along_tokens)
            f1 = as_smem.index(k + 1).load(along_tokens)
            f1 *= ws_each.index(spot + 1).load(along_tokens)
            raw0 = warpgroup_mma_wait(1, deps=[token0])
            acc = gl.fma(raw0, gl.expand_dims(f0, 0).broadcast_to(acc.shape), acc)
            raw1 = warpgroup_mma_wait(0, deps=[token1])
            if REFILL:
                barrier()
                has = done + STAGES < total
                bar = ready.index(stage)
                mbarrier.expect(bar, nbytes, pred=has)
                ahead = first_k + next_k
                _copy_stage(w_desc, next_tile * BLOCK_N, ahead, bar, w_smem, stage, has)
                if not FUSED:
                    _copy_stage(a_desc, 0, ahead, bar, a_smem, stage, has)
                next_tile, next_k = _advance(next_tile, next_k, groups, blocks)
                done += 1
            acc = gl.fma(raw1, gl.expand_dims(f1, 0).broadcast_to(acc.shape), acc)
            stage, phase = next_stage(stage, phase, 1, STAGES)
        side = side ^ 1
        ws_smem.index(side).store(float_scale(ws_following))
        ws_following = ws_later
        _finish(
            acc, c, bias, out, partial, counters, tile, split, M, N, BLOCK_N, TOKENS, SPLITS, WARPS
        )  # fmt: skip


@gluon.jit
def _finish(
    acc, c, bias, out, partial, counters, tile, split, M, N,
    BLOCK_N: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, TOKENS] of a part -> the tile of out, by the last part to come here."""
    target: gl.constexpr = gl.BlockedLayout(
        [8, 1], [8, 4], [BLOCK_N // 64, WARPS * 64 // BLOCK_N], [0, 1]
    )
    if SPLITS > 1:
        wide: gl.constexpr = gl.BlockedLayout(
            [1, 4], [128 // TOKENS, TOKENS // 4], [WARPS, 1], [1, 0]
        )
        row = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide)), 1)
        column = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, wide)), 0)
        SIZE: gl.constexpr = BLOCK_N * TOKENS
        parts = partial + (tile * SPLITS).to(gl.int64) * SIZE + row * TOKENS + column
        part = gl.convert_layout(acc, wide)
        last, value = add_parts(part, parts, counters + tile, split, SPLITS, SIZE)
    else:
        barrier()  # every warp has read what the next tile overwrites
        last = True
        value = acc
    if last:
        result = gl.convert_layout(value, target)
        n = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, target))
        m = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, target)), 0)
        if c is not None:
            result *= gl.expand_dims(gl.load(c + n // 128, mask=n < N, other=0.0), 1)
        if bias is not None:
            result += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
        n = gl.expand_dims(n, 1)
        result = result.to(out.dtype.element_ty)
        gl.store(out + m.to(gl.int64) * N + n, result, mask=(m < M) & (n < N))


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor, config: DecodeConfig,
    counters: torch.Tensor | None, ue8m0: bool, floor: int,
) -> Launch:  # fmt: skip
    """a: codes with scales a_s, or activations (a_s None) quantized as `ue8m0` and `floor` say.

    counters: int32 zeros, one for each tile of w's rows, which are zero again afterwards; no two
    launches that use them may run at the same time. None without splits.
    """
    (M, K), N = a.shape, w.shape[0]
    NK, tiles = ceil_div(K, 128), ceil_div(N, config.block_n)
    fused, splits, warps = a_s is None, config.splits, config.warps
    size = tiles * splits * config.block_n * config.tokens
    partial = Scratch(size) if splits > 1 else None
    groups = min(tiles, max(1, config.programs // splits))
    return Launch(
        _decode_gemm_kernel, (groups * splits,),
        code_tiles(w, config.block_n), None if fused else code_tiles(a, config.tokens),
        a if fused else None, a_s, sf, c, bias, out, partial, counters, M, N, K, NK,
        a.stride(0) if fused and M > 1 else 0, *((0, 0) if fused else a_s.stride()), sf.stride(0),
        TOKENS=config.tokens, STAGES=config.stages, SPLITS=splits, BLOCKS=config.blocks(NK),
        REFILL=ceil_div(tiles, groups) * ceil_div(ceil_div(NK, 2), splits) > config.stages,
        MN_MAJOR=not fused and column_major(a_s), UE8M0=ue8m0, FLOOR=floor, WARPS=warps,
        num_warps=warps, launch_pdl=True, **FMA,
    )  # fmt: skip
