"""Block-scaled GEMM: out [M, N] = dequantized a [M, K] @ dequantized w [N, K]^T (* c, + bias).

a    [M, K] e4m3 with a_s [M, ceil(K / GRAN_K)] uint8 or float32; or bf16/fp16/fp32, a_s None
w    [N, K] e4m3 with sf [ceil(N / GRAN_N), ceil(K / GRAN_K)] uint8 or float32
c    [ceil(N / GRAN_N)] float32 or None;  bias [N] or None;  out [M, N] bf16/fp16/fp32
All row-major with unit stride along the last dimension. GRAN_K is a power of two from 32; GRAN_N
is any, a power of two from 16 is fastest. K and N may end inside a group.

acc += dot(a, w) * scale, in float32, for one scale group of K at a time (`multiply`, shared with
grouped_gemm). Two byte scales are exact for every pair of bytes; products with a float32 scale
multiply the two scales first. NaN in a row of a stays in its row.

BLOCK_SCALED, for two byte scales on sm_100: tensor cores scale, and sum all of K in their memory.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, batch_invariant, kernel_codes
from .replay import Launch, launched
from .ue8m0 import decode, dot, dot_scaled, round_to, split, to_float


@triton.jit
def _outer(row, column, UNIFORM: tl.constexpr):
    """[BLOCK_M] by a scalar (UNIFORM) or [BLOCK_N] -> a factor that broadcasts over the tile."""
    if UNIFORM:
        return (row * column)[:, None]
    else:
        return row[:, None] * column[None, :]


@triton.jit
def multiply(
    a, a_s, w, sf, rows, first_column, N, K, stride_am, stride_asm, stride_wn, stride_sn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GRAN_N: tl.constexpr, GRAN_K: tl.constexpr, EVEN_K: tl.constexpr, QUANTIZED: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
):  # fmt: skip
    """float32 tile of a[rows] @ w[first_column:]^T; rows int64, all valid, may repeat."""
    # Where a tile lies in one row of the scale grid, its scale is a scalar.
    UNIFORM: tl.constexpr = GRAN_N % BLOCK_N == 0
    # Columns past the end read the last one: their products are not stored.
    columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + rows[:, None] * stride_am + k[None, :]  # [BLOCK_M, BLOCK_K]
    w_tile = w + columns[None, :] * stride_wn + k[:, None]  # [BLOCK_K, BLOCK_N]
    if UNIFORM:
        sf_row = sf + (first_column // GRAN_N).to(tl.int64) * stride_sn
    else:
        sf_row = sf + columns // GRAN_N * stride_sn
    if QUANTIZED:
        a_s_row = a_s + rows * stride_asm
    if BLOCK_SCALED:
        # Weights first: the first operand has to have 128 rows, the second from 16 on.
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        next_a, next_w = tl.load(a_s_row), tl.load(sf_row)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_block, w_block = tl.load(a_tile), tl.load(w_tile)
        else:
            used = k < K - start
            a_block = tl.load(a_tile, mask=used[None, :], other=0.0)
            w_block = tl.load(w_tile, mask=used[:, None], other=0.0)
        if BLOCK_SCALED:
            # Triton copies ahead codes, but no bytes: these loads would be waited for.
            a_scale, w_scale = next_a, next_w
            group = tl.minimum(start + BLOCK_K, K - 1) // GRAN_K
            next_a, next_w = tl.load(a_s_row + group), tl.load(sf_row + group)
            acc = dot_scaled(tl.trans(w_block), w_scale, tl.trans(a_block), a_scale, acc)
        else:
            product = dot(a_block, w_block)
            w_scale = tl.load(sf_row + start // GRAN_K)
            if QUANTIZED:
                a_scale = tl.load(a_s_row + start // GRAN_K)
                if a_scale.dtype == tl.uint8 and w_scale.dtype == tl.uint8:
                    a_low, a_high = split(a_scale)
                    w_low, w_high = split(w_scale)
                    product *= _outer(a_low, w_high, UNIFORM)
                    acc += product * _outer(a_high, w_low, UNIFORM)
                else:
                    acc += product * _outer(decode(a_scale), decode(w_scale), UNIFORM)
            elif UNIFORM:
                acc += product * decode(w_scale)
            else:
                acc += product * decode(w_scale)[None, :]
        a_tile += BLOCK_K
        w_tile += BLOCK_K
    return tl.trans(acc) if BLOCK_SCALED else acc


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    a, a_s, w, sf, c, bias, out,
    M, N, K, stride_am, stride_asm, stride_wn, stride_sn, stride_om,
    GRAN_N: tl.constexpr, GRAN_K: tl.constexpr, HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUANTIZED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles in bands of GROUP_M tile rows: programs that run together share operands in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band, within = tl.program_id(0) // (GROUP_M * tiles_n), tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    row_tile, column_tile = band * GROUP_M + within % height, within // height

    first_column = column_tile * BLOCK_N
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = multiply(
        a, a_s, w, sf, tl.minimum(rows, M - 1), first_column, N, K,
        stride_am, stride_asm, stride_wn, stride_sn,
        BLOCK_M, BLOCK_N, BLOCK_K, GRAN_N, GRAN_K, EVEN_K, QUANTIZED, BLOCK_SCALED,
    )  # fmt: skip
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < N
    if HAS_C:
        acc *= tl.load(c + columns // GRAN_N, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        acc += to_float(tl.load(bias + columns, mask=inside, other=0.0))[None, :]
    target = out + rows[:, None] * stride_om + columns[None, :]
    mask = (rows < M)[:, None] & inside[None, :]
    tl.store(target, round_to(acc, out.dtype.element_ty), mask=mask)


def tile_config(
    rows: int, dtype: torch.dtype, gran: tuple[int, int], block_scaled: bool = False,
    one_warp: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Tile sizes, warps and stages for about `rows` rows of a in `dtype`.

    one_warp: whether the GPU's instructions multiply for one warp (config.one_warp_products).
    """
    if block_scaled:
        return _scaled_config(rows, gran)
    # Fastest of a few on an H100 with Triton 3.6, 2026-11, for M = 1, 32, 64, 256, 4096 and
    # (N, K) = (7168, 2048), (4096, 7168), (2112, 7168).
    if batch_invariant():
        # Hopper sums tiles of fewer rows on other instructions: 11 % of bf16 results of (M, 4096,
        # 7168) differ by one ulp between 16 and 64 rows (H100, 2026-11-23).
        rows = max(rows, 64)
    if dtype == torch.float32:  # multiplied without tensor cores
        m, n, k, warps, stages = 16 if rows <= 16 else 32, 64, 32, 4, 2
    elif rows <= 16:
        m, n, k, warps, stages = 16, 64, 128, 4, 6
    elif rows <= 32:
        m, n, k, warps, stages = 32, 32, 128, 4, 5
    elif rows <= 64:
        m, n, k, warps, stages = 64, 64, 128, 4, 6
    elif rows <= 512:
        m, n, k, warps, stages = 64, 128, 128, 4, 4
    else:
        m, n, k, warps, stages = 128, 128, 128, 8, 3
    if one_warp and n == 128:
        # Operands come by way of registers: compiled for sm_80, sm_89 and sm_120, the tiles above
        # spill 8 to 688 bytes, these 0 to 72, those of 72 for sm_80 by Triton 3.6. Not measured.
        # Batch-invariant sums take 128 of K at once for any number of rows.
        warps, stages = 8, 4
        if m == 128 and batch_invariant():
            m = 64
        elif m == 128:
            k, stages = 64, 5 if dtype.itemsize == 1 else 3
    if dtype.itemsize == 2:
        k = 64
    # A tile inside one scale row is cheaper than a narrower one, down to the narrowest dot.
    if gran[0] < n and gran[0] >= 16 and gran[0] & (gran[0] - 1) == 0:
        n = gran[0]
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": min(k, gran[1]), "BLOCK_SCALED": False,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _scaled_config(rows: int, gran: tuple[int, int]) -> dict[str, int]:
    """On sm_100, by what its SMs have: compiled for it, but never run (2026-11-23)."""
    # 128 columns are the first operand. Heights are those above, measured on a GPU of as many SMs.
    # Two programs shall fit into an SM, with half of its 512 columns of tensor memory and of its
    # 227 KiB (stages - 1 blocks) each: Triton waits for every scaled product, and while one program
    # waits, the other multiplies. 128 rows by 4 warps would spill where experts' rows are weighted;
    # by 8 that kernel has registers for one program.
    if batch_invariant():
        # The same instruction for any number of rows; w, the larger part, is read once as before.
        rows = 1024
    if rows <= 16:
        m, warps, stages = 16, 4, 7
    elif rows <= 32:
        m, warps, stages = 32, 4, 6
    elif rows <= 512:
        m, warps, stages = 64, 4, 5
    else:
        m, warps, stages = 128, 8, 4
    return {
        "BLOCK_M": m, "BLOCK_N": 128, "BLOCK_K": min(128, gran[1]), "BLOCK_SCALED": True,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, bias: torch.Tensor | None, gran: tuple[int, int],
    config: dict[str, int], out: torch.Tensor,
) -> Launch:  # fmt: skip
    (M, K), N = a.shape, w.shape[0]
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    # The row stride of a single row is arbitrary and must not select another compilation.
    return Launch(
        _gemm_kernel, grid,
        kernel_codes(a), a_s, kernel_codes(w), sf, c, bias, out, M, N, K,
        a.stride(0) if M > 1 else K, 0 if a_s is None else a_s.shape[1], w.stride(0), sf.stride(0),
        out.stride(0),
        GRAN_N=gran[0], GRAN_K=gran[1], HAS_C=c is not None, HAS_BIAS=bias is not None,
        QUANTIZED=a_s is not None, EVEN_K=K % config["BLOCK_K"] == 0, GROUP_M=8, **config, **FMA,
    )  # fmt: skip
