"""RMSNorm, with or without the residual add, and quantized: x [M, K] -> e4m3 [M, K] and scales.

r = x + residual, rounded to x's dtype and written to residual_out (r = x without a residual);
y = r / sqrt(mean(r^2) + eps) * weight, in float32 from the rounded r, rounded once to x's dtype and
written to normed if that is given; then, if q is, quantized as act_quant does. These are the
roundings of the separate steps as vLLM's CUDA kernels take them; only the order of the sum over K
is left open, and it depends on K alone.
x, residual: unit stride along K; weight [K] contiguous; q, residual_out, normed contiguous.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, dependent_launch
from .replay import Launch, replayed
from .tile import store_tile, wait_for_inputs
from .ue8m0 import round_to, to_float


@triton.jit(do_not_specialize=["M", "stride_s"])
def _rms_norm_quant_kernel(
    x, residual, weight, q, s, residual_out, normed, eps, M, K, groups, stride_xm, stride_rm,
    stride_s, FLOOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_NORMED: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # a tile of one row
    k = tl.arange(0, GROUPS * GROUP)
    mask = (k < K)[None, :]
    values = to_float(tl.load(x + row[:, None] * stride_xm + k[None, :], mask=mask, other=0.0))
    place = row[:, None] * K + k[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + row[:, None] * stride_rm + k[None, :], mask=mask, other=0.0)
    # Loads in this order, before the first store and the reduction, which what follows waits for.
    # H100, 2026-11-22, us at M = 1 and 8192: 2.45 and 137.4; weight first 2.94 and 138.3; weight
    # after the reduction 2.96 and 139.3.
    scale = to_float(tl.load(weight + k, mask=k < K, other=0.0))[None, :]
    if HAS_RESIDUAL:
        total = round_to(values + to_float(added), dtype)
        tl.store(residual_out + place, total, mask=mask)
        values = to_float(total)
    mean = tl.math.div_rn(tl.sum(values * values, axis=1), K.to(tl.float32))
    rstd = tl.math.div_rn(1.0, tl.sqrt_rn(mean + eps))
    result = round_to(values * rstd[:, None] * scale, dtype)
    if HAS_NORMED:
        tl.store(normed + place, result, mask=mask)
    if QUANTIZE:
        # No more codes a thread than it loads values: how values are spread over threads, and so
        # the order of their sum, follows the widest access, and is to be that of all variants.
        store_tile(
            to_float(result), q, s, None, row, 0, M, K, groups, stride_s,
            FLOOR, GROUP, 1, GROUPS, MN_MAJOR, PACKED, 0, WIDTH=128 // dtype.primitive_bitwidth,
        )  # fmt: skip


@replayed
def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    q: torch.Tensor | None,
    s: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normed: torch.Tensor | None,
    group: int,
    floor: int,
    mn_major: bool,
    num_warps: int,
) -> Launch:
    """Normalize and, given q and s, quantize; s is of uint8, float32 or int32, for packed bytes."""
    M, K = x.shape
    groups = triton.cdiv(K, group)
    packed = s is not None and s.dtype == torch.int32
    return Launch(
        _rms_norm_quant_kernel, (M,),
        x, residual, weight, None if q is None else q.view(torch.uint8), s, residual_out, normed,
        eps, M, K, groups,
        x.stride(0) if M > 1 else K,
        K if residual is None or M == 1 else residual.stride(0), 0 if s is None else s.stride(1),
        FLOOR=floor, GROUP=group,
        GROUPS=max(triton.next_power_of_2(groups), 4 if packed else 1),
        MN_MAJOR=mn_major, PACKED=packed, HAS_RESIDUAL=residual is not None,
        HAS_NORMED=normed is not None, QUANTIZE=q is not None, num_warps=num_warps,
        **dependent_launch(x.device), **FMA,
    )  # fmt: skip
