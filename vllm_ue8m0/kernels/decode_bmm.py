"""Batched product of few rows on sm_90: out[h] [M, N] = x[h] [M, K] @ w[h] [N, K]^T, M <= 64.

x    [H, M, K] bf16/fp16, rows and batches of any strides of 16 bytes
w    [H, N, K] as x, contiguous, or H parts of K of contiguous rows; N a multiple of 64, K of 128
out  [H, M, N] as x, or float32, unit stride along N

The weights are the tensor cores' first operand (swap-AB), as in decode_gemm. A program owns some
rows of one batch's weights, which are in shared memory, all of them, or on their way before the
kernel waits for its inputs. Sums are float32, in order of K.
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

from .config import FMA
from .hopper import barrier, copy_to_shared, half_tiles, start_dependents, wait_for_inputs
from .hopper_config import tokens
from .replay import Launch, launched

# Of w's rows a program: many small ones, which fit beside those of the kernel before. Larger tiles
# and 8 warps are within 0.5 % of a layer (docs/design.md).
BLOCK_N = 64
WIDTH = 128  # of K, that is copied together


@gluon.jit(do_not_specialize=["M"])
def _decode_bmm_kernel(
    w_desc, x_desc, out, M, N, rows_h, columns_h, stride_h, stride_oh, stride_om,
    TOKENS: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """From one batch to the next: rows_h and columns_h of w_desc; stride_h columns of x_desc, where
    all batches are beside each other."""
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    WIDTH: gl.constexpr = w_desc.block_type.shape[1]
    dtype: gl.constexpr = w_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    w_smem = gl.allocate_shared_memory(dtype, [CHUNKS, BLOCK_N, WIDTH], w_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [CHUNKS, TOKENS, WIDTH], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    n, h = gl.program_id(0) * BLOCK_N, gl.program_id(1)
    for i in gl.static_range(CHUNKS):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    row, column = h * rows_h + n, h * columns_h
    for i in gl.static_range(CHUNKS):
        mbarrier.expect(ready.index(i), 2 * WIDTH * (BLOCK_N + TOKENS))
        copy_to_shared(w_desc, [row, column + i * WIDTH], ready.index(i), w_smem.index(i))
    start_dependents()
    wait_for_inputs()
    for i in gl.static_range(CHUNKS):
        copy_to_shared(x_desc, [0, h * stride_h + i * WIDTH], ready.index(i), x_smem.index(i))
    acc = gl.zeros([BLOCK_N, TOKENS], gl.float32, mma)
    for i in gl.static_range(CHUNKS):
        mbarrier.wait(ready.index(i), 0)
        acc = warpgroup_mma(
            w_smem.index(i), x_smem.index(i).permute((1, 0)), acc, use_acc=i > 0, is_async=True
        )
    acc = warpgroup_mma_wait(0, deps=[acc])
    target: gl.constexpr = gl.BlockedLayout(
        [8, 1], [8, 4], [BLOCK_N // 64, WARPS * 64 // BLOCK_N], [0, 1]
    )
    result = gl.convert_layout(acc.to(out.dtype.element_ty), target)
    columns = gl.expand_dims(n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, target)), 1)
    m = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, target)), 0)
    place = out + h.to(gl.int64) * stride_oh + m.to(gl.int64) * stride_om + columns
    gl.store(place, result, mask=m < M)


@launched
def launch(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Launch:
    """Write x times w to out."""
    (H, M, K), N = x.shape, w.shape[1]
    rows, apart = tokens(M), w.stride(0) >= w.stride(1)
    weights = w.view(H * N, K) if apart else _beside(w)
    return Launch(
        _decode_bmm_kernel, (N // BLOCK_N, H),
        half_tiles(weights, BLOCK_N, WIDTH), half_tiles(_beside(x), rows, WIDTH), out,
        M, N, N if apart else 0, 0 if apart else w.stride(0), x.stride(0), *out.stride()[:2],
        TOKENS=rows, CHUNKS=K // WIDTH, WARPS=4, num_warps=4, launch_pdl=True, **FMA,
    )  # fmt: skip


def _beside(x: torch.Tensor) -> torch.Tensor:
    """Rows of all batches of x, one beside the other."""
    H, M, K = x.shape
    return x.as_strided((M, (H - 1) * x.stride(0) + K), (x.stride(1), 1))
