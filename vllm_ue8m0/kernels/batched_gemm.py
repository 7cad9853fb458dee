"""GEMM of rows that lie with their experts: a [E, M, K] times w [E, N, K] transposed -> [E, M, N].

Of each expert's M rows the first counts[e] are used; the others are neither read nor written. The
counts are on the device alone: a grid of fixed size shares the used tiles evenly (tile.py), so that
one CUDA graph serves any counts.

Operands and accumulation as in gemm.py, with a_s [E, M, ..], sf [E, .., ..] and c [E, ..]. The
product is rounded once.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, kernel_codes, masked_programs
from .gemm import multiply
from .replay import Launch, launched
from .tile import find_tile, used_tiles
from .ue8m0 import round_to


@triton.jit(do_not_specialize=["M"])
def _batched_gemm_kernel(
    a, a_s, w, sf, c, out, counts,
    E, M, N, K, stride_ae, stride_am, stride_asm, stride_we, stride_wn, stride_se, stride_sn,
    stride_ce,
    GRAN_N: tl.constexpr, GRAN_K: tl.constexpr, HAS_C: tl.constexpr, QUANTIZED: tl.constexpr,
    EVEN_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows of a; an expert's w stays in L2 for its next tile.
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_column = tl.program_id(0) % tiles_n * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < N
    tiles, ends = used_tiles(counts, M, E, BLOCK_M, EXPERTS)
    for index in range(
        tl.program_id(0) // tiles_n, tl.sum(tiles, 0), tl.num_programs(0) // tiles_n
    ):
        expert, tile, limit = find_tile(index, tiles, ends, counts, M)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        # Rows past the end repeat the expert's last one: their products are not stored.
        source = tl.minimum(row, limit - 1).to(tl.int64)
        scales = a_s + expert * M * stride_asm if QUANTIZED else None
        acc = multiply(
            a + expert * stride_ae, scales, w + expert * stride_we, sf + expert * stride_se,
            source, first_column, N, K, stride_am, stride_asm, stride_wn, stride_sn,
            BLOCK_M, BLOCK_N, BLOCK_K, GRAN_N, GRAN_K, EVEN_K, QUANTIZED, BLOCK_SCALED,
        )  # fmt: skip
        if HAS_C:
            factor = tl.load(c + expert * stride_ce + columns // GRAN_N, mask=inside, other=0.0)
            acc *= factor[None, :]
        target = out + (expert * M + row)[:, None] * N + columns[None, :]
        mask = (row < limit)[:, None] & inside[None, :]
        tl.store(target, round_to(acc, out.dtype.element_ty), mask=mask)


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, gran: tuple[int, int], counts: torch.Tensor, config: dict[str, int],
    out: torch.Tensor,
) -> Launch:  # fmt: skip
    """counts [E] int32 or int64, contiguous as a_s and out are."""
    (E, M, K), N = a.shape, w.shape[1]
    columns, tiles = triton.cdiv(N, config["BLOCK_N"]), E * triton.cdiv(M, config["BLOCK_M"])
    return Launch(
        _batched_gemm_kernel, (masked_programs(columns, tiles),),
        kernel_codes(a), a_s, kernel_codes(w), sf, c, out, counts, E, M, N, K,
        a.stride(0) if E > 1 else 0, a.stride(1) if M > 1 else K,
        0 if a_s is None else a_s.shape[2],
        w.stride(0), w.stride(1), sf.stride(0), sf.stride(1), 0 if c is None else c.stride(0),
        GRAN_N=gran[0], GRAN_K=gran[1], HAS_C=c is not None, QUANTIZED=a_s is not None,
        EVEN_K=K % config["BLOCK_K"] == 0, EXPERTS=triton.next_power_of_2(E), **config, **FMA,
    )  # fmt: skip
