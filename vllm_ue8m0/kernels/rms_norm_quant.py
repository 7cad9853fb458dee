"""RMSNorm, with or without the residual add, and quantized: x [M, K] -> e4m3 [M, K] and scales.

r = x + residual, rounded to x's dtype and written to residual_out (r = x without a residual;
with `shared`, x * factor + shared stands for x, both steps rounded: experts' results);
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
from .replay import Launch, launched
from .tile import start_dependents_and_wait, store_tile
from .ue8m0 import round_to, to_float


def has_its_order(L: int, K: int) -> bool:
    """Whether a norm of L columns of 16 bits is summed beside one of K as it is alone.

    8 neighbours on each thread, as Triton gives them where rows are whole multiples of 16, and no
    more than that on the warps that config.py gives a norm.
    """
    return L % 16 == 0 and min(K, 2048) >= L


@triton.jit
def _normalize(values, scale, K, eps, dtype: tl.constexpr):
    """float32 rows [1, columns], zeros past K, times scale [1, columns] -> rounded to dtype."""
    mean = tl.math.div_rn(tl.sum(values * values, axis=1), K.to(tl.float32))
    rstd = tl.math.div_rn(1.0, tl.sqrt_rn(mean + eps))
    return round_to(values * rstd[:, None] * scale, dtype)


@triton.jit(do_not_specialize=["M", "stride_s"])
def _rms_norm_quant_kernel(
    x, shared, residual, weight, q, s, residual_out, normed, factor, eps, M, K, groups, stride_xm,
    stride_am, stride_rm, stride_s, FLOOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_NORMED: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):  # fmt: skip
    start_dependents_and_wait(PDL)
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # a tile of one row
    k = tl.arange(0, GROUPS * GROUP)
    mask = (k < K)[None, :]
    values = to_float(tl.load(x + row[:, None] * stride_xm + k[None, :], mask=mask, other=0.0))
    place = row[:, None] * K + k[None, :]
    if HAS_SHARED:
        beside = tl.load(shared + row[:, None] * stride_am + k[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + row[:, None] * stride_rm + k[None, :], mask=mask, other=0.0)
    # Loads in this order, before the first store and the reduction, which what follows waits for.
    # H100, 2026-11-22, us at M = 1 and 8192: 2.45 and 137.4; weight first 2.94 and 138.3; weight
    # after the reduction 2.96 and 139.3.
    scale = to_float(tl.load(weight + k, mask=k < K, other=0.0))[None, :]
    if HAS_SHARED:
        values = to_float(round_to(values * factor, dtype))
        values = to_float(round_to(values + to_float(beside), dtype))
    if HAS_RESIDUAL:
        total = round_to(values + to_float(added), dtype)
        tl.store(residual_out + place, total, mask=mask)
        values = to_float(total)
    result = _normalize(values, scale, K, eps, dtype)
    if HAS_NORMED:
        tl.store(normed + place, result, mask=mask)
    if QUANTIZE:
        # No more codes a thread than it loads values: how values are spread over threads, and so
        # the order of their sum, follows the widest access, and is to be that of all variants.
        store_tile(
            to_float(result), q, s, None, row, 0, M, K, groups, stride_s,
            FLOOR, GROUP, 1, GROUPS, MN_MAJOR, PACKED, 0, WIDTH=128 // dtype.primitive_bitwidth,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "stride_s"])
def _latent_norm_quant_kernel(
    x, weight, side_weight, q, s, side, rest, eps, side_eps, M, K, L, R, groups, stride_xm,
    stride_s, FLOOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, REST: tl.constexpr,
    MN_MAJOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two norms of a row's parts and a copy of the third one, of 16-bit dtypes.

    Each norm has the bits of the kernel above: the second one's values lie on as many threads as
    there, 8 on each, and the rest of the tile is zeros.
    """
    start_dependents_and_wait(PDL)
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    k, r = tl.arange(0, GROUPS * GROUP), tl.arange(0, REST)
    source = x + row[:, None] * stride_xm
    values = to_float(tl.load(source + k[None, :], mask=(k < K)[None, :], other=0.0))
    others = to_float(tl.load(source + K + k[None, :], mask=(k < L)[None, :], other=0.0))
    copied = tl.load(source + K + L + r[None, :], mask=(r < R)[None, :])
    scale = to_float(tl.load(weight + k, mask=k < K, other=0.0))[None, :]
    side_scale = to_float(tl.load(side_weight + k, mask=k < L, other=0.0))[None, :]
    tl.store(rest + row[:, None] * R + r[None, :], copied, mask=(r < R)[None, :])
    normed = _normalize(others, side_scale, L, side_eps, dtype)
    tl.store(side + row[:, None] * L + k[None, :], normed, mask=(k < L)[None, :])
    store_tile(
        to_float(_normalize(values, scale, K, eps, dtype)), q, s, None, row, 0, M, K, groups,
        stride_s, FLOOR, GROUP, 1, GROUPS, MN_MAJOR, False, 0,
        WIDTH=128 // dtype.primitive_bitwidth,
    )  # fmt: skip


@launched
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
    shared: torch.Tensor | None = None,
    factor: float = 1.0,
) -> Launch:
    """Normalize and, given q and s, quantize; s is of uint8, float32 or int32, for packed bytes."""
    M, K = x.shape
    groups = triton.cdiv(K, group)
    packed = s is not None and s.dtype == torch.int32
    return Launch(
        _rms_norm_quant_kernel, (M,),
        x, shared, residual, weight, None if q is None else q.view(torch.uint8), s, residual_out,
        normed, factor, eps, M, K, groups,
        x.stride(0) if M > 1 else K,
        K if shared is None or M == 1 else shared.stride(0),
        K if residual is None or M == 1 else residual.stride(0), 0 if s is None else s.stride(1),
        FLOOR=floor, GROUP=group,
        GROUPS=max(triton.next_power_of_2(groups), 4 if packed else 1),
        MN_MAJOR=mn_major, PACKED=packed, HAS_RESIDUAL=residual is not None,
        HAS_NORMED=normed is not None, QUANTIZE=q is not None, HAS_SHARED=shared is not None,
        num_warps=num_warps, **dependent_launch(x.device), **FMA,
    )  # fmt: skip


@launched
def launch_latent(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    side_weight: torch.Tensor,
    side_eps: float,
    q: torch.Tensor,
    s: torch.Tensor,
    side: torch.Tensor,
    rest: torch.Tensor,
    group: int,
    floor: int,
    mn_major: bool,
    num_warps: int,
) -> Launch:
    """x [M, K + L + R] of 16 bits: q [M, K] and s of the first norm, side [M, L] of the second,
    rest [M, R]; see has_its_order. num_warps is that of K columns.
    """
    (M, K), L, R = q.shape, side.shape[1], rest.shape[1]
    groups = triton.cdiv(K, group)
    return Launch(
        _latent_norm_quant_kernel, (M,),
        x, weight, side_weight, q.view(torch.uint8), s, side, rest, eps, side_eps, M, K, L, R,
        groups, x.stride(0) if M > 1 else x.shape[1], s.stride(1),
        FLOOR=floor, GROUP=group, GROUPS=triton.next_power_of_2(groups),
        REST=triton.next_power_of_2(max(R, 1)), MN_MAJOR=mn_major, num_warps=num_warps,
        **dependent_launch(x.device), **FMA,
    )  # fmt: skip
