"""Quantization and dequantization: allocate, choose a launch configuration, launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats import BLOCK, SF_FLOOR
from ..kernels import act_quant as act_quant_kernel
from ..kernels import rms_norm_quant as rms_norm_quant_kernel
from ..kernels import silu_mul_quant as silu_mul_quant_kernel
from ..kernels import weight_dequant as weight_dequant_kernel
from ..kernels import weight_quant as weight_quant_kernel
from ..kernels.config import (
    MASKED_TILE,
    act_quant_config,
    rms_norm_quant_warps,
    silu_mul_quant_config,
    weight_quant_warps,
)
from ..layouts import ceil_div, empty_scale, grid_shape

E4M3 = torch.float8_e4m3fn


def act_quant(
    x: torch.Tensor,
    group: int = BLOCK,
    ue8m0: bool = False,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    counts: torch.Tensor | None = None,
    destinations: torch.Tensor | None = None,
    out_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups along the last dimension; see reference.act_quant."""
    matrices = _matrices(unit_stride(x), layout, counts)
    q, s = empty_quantized(x.shape, x.shape[-1], group, ue8m0, layout, x.device, out_rows)
    if q.numel() and x.numel():
        E, M, K = matrices.shape
        mn_major = layout != "row_major"
        config = act_quant_config(E * M, ceil_div(K, group), mn_major)
        config = config if counts is None else MASKED_TILE
        act_quant_kernel.launch(
            matrices, q, _scale_matrices(s, E), group, floor, mn_major, config, counts,
            destinations,
        )  # fmt: skip
    return q, s


def silu_mul_quant(
    gate_up: torch.Tensor,
    group: int = BLOCK,
    ue8m0: bool = False,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    counts: torch.Tensor | None = None,
    destinations: torch.Tensor | None = None,
    out_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantized; see reference.silu_mul_quant."""
    matrices = _matrices(unit_stride(gate_up), layout, counts)
    E, M, K = *matrices.shape[:2], gate_up.shape[-1] // 2
    q, s = empty_quantized(gate_up.shape, K, group, ue8m0, layout, gate_up.device, out_rows)
    if q.numel() and gate_up.numel():
        mn_major = layout != "row_major"
        config = silu_mul_quant_config(E * M, ceil_div(K, group))
        config = config if counts is None else MASKED_TILE
        silu_mul_quant_kernel.launch(
            matrices, q, _scale_matrices(s, E), group, floor, mn_major, config, counts,
            destinations,
        )  # fmt: skip
    return q, s


def silu_mul(gate_up: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of [..., 2 I], not quantized; see reference.silu_mul. counts: act_quant's."""
    K = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], K, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        matrices = _matrices(unit_stride(gate_up), "row_major", counts)
        config = silu_mul_quant_config(matrices.shape[1], ceil_div(K, BLOCK))
        config = config if counts is None else MASKED_TILE
        silu_mul_quant_kernel.launch(matrices, out, None, BLOCK, SF_FLOOR, False, config, counts)
    return out


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    group: int = BLOCK,
    ue8m0: bool = False,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    normed: bool = False,
    *,
    shared: torch.Tensor | None = None,
    factor: float = 1.0,
) -> list[torch.Tensor]:
    """RMSNorm (of x + residual), quantized; see reference.rms_norm_quant.

    shared: of x * factor + shared in place of x; see reference.norm_linear.
    """
    if shared is not None and x.element_size() != 2:  # the kernel would fuse both steps
        x, shared = x * factor + shared, None
    q, s = empty_quantized(x.shape, x.shape[-1], group, ue8m0, layout, x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if normed else None
    if q.numel():
        rms_norm_quant_kernel.launch(
            unit_stride(x), None if residual is None else unit_stride(residual),
            weight.contiguous(), eps, q, s, total, result, group, floor, layout != "row_major",
            rms_norm_quant_warps(x.shape[1]), None if shared is None else unit_stride(shared),
            factor,
        )  # fmt: skip
    return [out for out in (q, s, total, result) if out is not None]


def latent_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    side_weight: torch.Tensor,
    side_eps: float,
    group: int = BLOCK,
    ue8m0: bool = False,
    layout: str = "row_major",
) -> list[torch.Tensor]:
    """rms_norm_quant of x's first columns, add_rms_norm of the next, a copy of the rest.

    x [M, K + L + R], weight [K], side_weight [L] -> [q [M, K], s, [M, L], [M, R]]: what
    reference.latent_linear multiplies, and the others of its results.
    """
    (M, columns), K, L = x.shape, len(weight), len(side_weight)
    if x.element_size() != 2 or not rms_norm_quant_kernel.has_its_order(L, K):
        first, latent, rest = latent_parts(x, weight, side_weight)
        q, s = rms_norm_quant(first, weight, eps, None, group, ue8m0, layout=layout)
        return [q, s, *add_rms_norm(latent, side_weight, side_eps), rest.clone()]
    q, s = empty_quantized((M, K), K, group, ue8m0, layout, x.device)
    side = torch.empty(M, L, dtype=x.dtype, device=x.device)
    copied = torch.empty(M, columns - K - L, dtype=x.dtype, device=x.device)
    if q.numel():
        rms_norm_quant_kernel.launch_latent(
            unit_stride(x), weight.contiguous(), eps, side_weight.contiguous(), side_eps, q, s,
            side, copied, group, SF_FLOOR, layout != "row_major", rms_norm_quant_warps(K),
        )  # fmt: skip
    return [q, s, side, copied]


def latent_parts(
    x: torch.Tensor, weight: torch.Tensor, side_weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The columns of each norm, and the rest."""
    K, L = len(weight), len(side_weight)
    return x[:, :K], x[:, K : K + L], x[:, K + L :]


def add_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """RMSNorm of x + residual, not quantized; see reference.add_rms_norm."""
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if normed.numel():
        rms_norm_quant_kernel.launch(
            unit_stride(x), None if residual is None else unit_stride(residual),
            weight.contiguous(), eps, None, None, total, normed, BLOCK, SF_FLOOR, False,
            rms_norm_quant_warps(x.shape[1]),
        )  # fmt: skip
    return [normed] if total is None else [normed, total]


def weight_quant(w: torch.Tensor, ue8m0: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] in 128x128 blocks; see reference.weight_quant. Waits for the GPU."""
    q, s = weight_quant_unchecked(w, ue8m0)
    if bool((s == 255).any() if ue8m0 else ~s.isfinite().all()):
        raise ValueError("weight_quant: the weight holds NaN or Inf")
    return q, s


def weight_quant_unchecked(
    w: torch.Tensor, ue8m0: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight_quant that leaves NaN and Inf to be seen in the scales: byte 255, or not finite."""
    N, K = w.shape
    q = torch.empty(N, K, dtype=E4M3, device=w.device)
    dtype = torch.uint8 if ue8m0 else torch.float32
    s = torch.empty(*grid_shape(N, K, (BLOCK, BLOCK)), dtype=dtype, device=w.device)
    if q.numel():
        weight_quant_kernel.launch(unit_stride(w), q, s, BLOCK, weight_quant_warps(ue8m0))
    return q, s


def weight_dequant(
    w: torch.Tensor,
    sf: torch.Tensor,
    gran: Sequence[int] = (BLOCK, BLOCK),
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """w * scale (* c) in float32, rounded once to out_dtype; any leading dimensions."""
    out = torch.empty(w.shape, dtype=out_dtype, device=w.device)
    if out.numel():
        N, K = w.shape[-2:]
        scales = kernel_scale(sf).contiguous()
        weight_dequant_kernel.launch(
            unit_stride(w.reshape(-1, N, K)), scales.view(-1, *scales.shape[-2:]),
            None if c is None else c.contiguous(), (gran[0], gran[1]), out.view(-1, N, K),
        )  # fmt: skip
    return out


def describe_quant(
    op: str, M: int, K: int, ue8m0: bool, layout: str = "row_major", masked: bool = False
) -> str:
    """The kernel of a quantization operator and how it is launched for [M, K] (weights: [N, K])."""
    groups, mn_major = ceil_div(K, BLOCK), layout != "row_major"
    if op in ("act_quant", "silu_mul_quant"):
        act = op == "act_quant"
        config = act_quant_config(M, groups, mn_major) if act else silu_mul_quant_config(M, groups)
        config = MASKED_TILE if masked else config
        text = f"{config.rows} x {config.groups} groups, {config.num_warps} warps"
    elif op == "rms_norm_quant":
        text = f"1 x K, {rms_norm_quant_warps(K)} warps"
    elif op == "weight_quant":
        text = f"{BLOCK} x {BLOCK}, {weight_quant_warps(ue8m0)} warps"
    else:
        text = "{} x {}, {} warps".format(*weight_dequant_kernel.TILE)
    return f"portable {op}, tile {text}"


def empty_quantized(
    shape: Sequence[int], K: int, group: int, ue8m0: bool, layout: str, device: torch.device,
    out_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes and scales for activations of `shape`, of which K columns are quantized."""
    *leading, M = shape[:-1] if out_rows is None else (out_rows,)
    q = torch.empty(*leading, M, K, dtype=E4M3, device=device)
    return q, empty_scale(leading, M, ceil_div(K, group), ue8m0, layout, device)


def kernel_scale(scale: torch.Tensor) -> torch.Tensor:
    """The dtypes that kernels take: uint8 or float32."""
    if scale.dtype == torch.float8_e8m0fnu:
        return scale.view(torch.uint8)
    return scale if scale.dtype == torch.uint8 else scale.to(torch.float32)


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _matrices(x: torch.Tensor, layout: str, counts: torch.Tensor | None) -> torch.Tensor:
    """[E, M, K] of [..., K]: one matrix unless counts or column-major scales keep several apart."""
    if layout == "row_major" and counts is None:
        return unit_stride(x.reshape(1, -1, x.shape[-1]))
    return x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x[None]


def _scale_matrices(s: torch.Tensor, E: int) -> torch.Tensor:
    """[E, M, G] with the strides of the layout."""
    if s.dim() == 2:
        return s[None]
    return s.flatten(0, -2)[None] if E == 1 and s.is_contiguous() else s.flatten(0, -3)
