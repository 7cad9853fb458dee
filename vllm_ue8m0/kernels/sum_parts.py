"""Sum of parts [P, M, N] float32 -> out [M, N], in order of the parts, rounded once.

Both contiguous. A thread has four numbers, of which it asks for all parts at once.
"""

import torch
import triton
import triton.language as tl

from .config import dependent_launch
from .replay import Launch, launched
from .tile import wait_for_inputs
from .ue8m0 import round_to

BLOCK = 128


@triton.jit
def _sum_parts_kernel(
    parts, out, total, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_for_inputs(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(parts + i, mask=i < total, other=0.0)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(parts + part * total + i, mask=i < total, other=0.0)
    tl.store(out + i, round_to(acc, out.dtype.element_ty), mask=i < total)


@launched
def launch(parts: torch.Tensor, out: torch.Tensor) -> Launch:
    """Write the sum of parts to out."""
    total = out.numel()
    return Launch(
        _sum_parts_kernel, (triton.cdiv(total, BLOCK),), parts, out, total,
        PARTS=len(parts), BLOCK=BLOCK, num_warps=1, **dependent_launch(out.device),
    )  # fmt: skip
