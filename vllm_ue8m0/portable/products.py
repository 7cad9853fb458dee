"""Products on the portable kernels: dense, and experts around the grouped and the batched one.

block_scaled    of backend sm100, which knows when: the tensor cores apply the scales (gemm.py)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats import BLOCK
from ..kernels import batched_gemm as batched_gemm_kernel
from ..kernels import gemm as gemm_kernel
from ..kernels import grouped_gemm as grouped_gemm_kernel
from ..kernels.config import one_warp_products
from ..layouts import ceil_div, local_experts
from .quant import (
    act_quant,
    add_rms_norm,
    kernel_scale,
    latent_norm_quant,
    latent_parts,
    rms_norm_quant,
    silu_mul,
    silu_mul_quant,
    unit_stride,
)

# Rows that the batched product is tiled for, unless an expert has room for fewer: the host does not
# know the counts, and in decoding, which the format is for, few of the rows are used.
BATCHED_ROWS = 64


def gemm(
    a: torch.Tensor,
    a_s: torch.Tensor | None,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    out_dtype: torch.dtype,
    *,
    block_scaled: bool = False,
) -> torch.Tensor:
    """a [M, K] times w [N, K]^T; a_s None: a is not quantized (bf16, fp16 or fp32)."""
    out = torch.empty(a.shape[0], w.shape[0], dtype=out_dtype, device=a.device)
    if out.numel():
        config = gemm_kernel.tile_config(
            len(a), a.dtype, _pair(gran), block_scaled, one_warp_products(a.device)
        )
        gemm_kernel.launch(
            unit_stride(a), None if a_s is None else kernel_scale(a_s).contiguous(),
            unit_stride(w), unit_stride(kernel_scale(sf)), c, bias, _pair(gran), config, out,
        )  # fmt: skip
    return out


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
    *,
    block_scaled: bool = False,
) -> torch.Tensor:
    """Quantize x [M, K] as activation_scale says, times w^T -> [M, N] in x's dtype."""
    a, a_s = _quantize(x, gran[1], activation_scale)
    return gemm(a, a_s, w, sf, c, bias, gran, x.dtype, block_scaled=block_scaled)


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    normed: bool,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
    shared: torch.Tensor | None = None,
    factor: float = 1.0,
    *,
    block_scaled: bool = False,
) -> list[torch.Tensor]:
    """linear of a norm; see reference.norm_linear."""
    if activation_scale == "none":
        x = x if shared is None else x * factor + shared
        a, *rest = add_rms_norm(x, norm_weight, eps, residual)
        a_s, rest = None, [*rest, a] if normed else rest
    else:
        a, a_s, *rest = rms_norm_quant(
            x, norm_weight, eps, residual, gran[1], activation_scale == "ue8m0", normed=normed,
            shared=shared, factor=factor,
        )  # fmt: skip
    out = gemm(a, a_s, w, sf, c, bias, gran, x.dtype, block_scaled=block_scaled)
    return [out, *rest]


def latent_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    side_weight: torch.Tensor,
    side_eps: float,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
    *,
    block_scaled: bool = False,
) -> list[torch.Tensor]:
    """linear of a norm beside another; see reference.latent_linear."""
    if activation_scale == "none":
        first, latent, rest = latent_parts(x, norm_weight, side_weight)
        (a,), a_s = add_rms_norm(first, norm_weight, eps), None
        beside = [*add_rms_norm(latent, side_weight, side_eps), rest.clone()]
    else:
        a, a_s, *beside = latent_norm_quant(
            x, norm_weight, eps, side_weight, side_eps, gran[1], activation_scale == "ue8m0"
        )
    out = gemm(a, a_s, w, sf, c, bias, gran, x.dtype, block_scaled=block_scaled)
    return [out, *beside]


def silu_mul_linear(
    gate_up: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
    *,
    block_scaled: bool = False,
) -> torch.Tensor:
    """linear of silu_mul, which quantizes; see reference.silu_mul_linear."""
    a, a_s = _silu_mul(gate_up, gran[1], activation_scale)
    return gemm(a, a_s, w, sf, c, bias, gran, gate_up.dtype, block_scaled=block_scaled)


def describe(op: str, M: int, N: int, K: int, *, block_scaled: bool = False) -> str:
    """How the product of quantized [M, K] and [N, K] is launched, in "gemm" or "linear"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = gemm_kernel.tile_config(
        M, torch.float8_e4m3fn, (BLOCK, BLOCK), block_scaled, one_warp_products(device)
    )
    tile = " x ".join(str(config[f"BLOCK_{size}"]) for size in "MNK")
    return f"portable {op}, tile {tile}, {config['num_warps']} warps"


def experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gran13: Sequence[int],
    gran2: Sequence[int],
    activation_scale: str,
    weight_on_input: bool,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    block_scaled: bool = False,
) -> torch.Tensor:
    """Routed experts; see reference.experts. Ids outside [0, E) are skipped."""
    topk_ids = local_experts(topk_ids, expert_map)
    (M, topk), E = topk_ids.shape, w13.shape[0]
    slots = M * topk
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if slots == 0:
        return out.zero_()
    weights = topk_weights.reshape(-1)
    source = x * topk_weights.to(x.dtype) if weight_on_input else x
    a, a_s = _quantize(source, gran13[1], activation_scale)

    # Both products use one routing, so one tile height: that of the average expert's rows.
    rows = ceil_div(slots, E)
    cores = block_scaled, one_warp_products(x.device)
    config13 = gemm_kernel.tile_config(rows, a.dtype, _pair(gran13), *cores)
    config2 = gemm_kernel.tile_config(rows, a.dtype, _pair(gran2), *cores)
    order, tiles = _route(topk_ids, E, config13["BLOCK_M"])

    gate_up = torch.empty(slots, w13.shape[1], dtype=x.dtype, device=x.device)
    grouped_gemm_kernel.launch(
        a, a_s, unit_stride(w13), unit_stride(kernel_scale(sf13)), c13, _pair(gran13), order, None,
        tiles, topk, True, config13, gate_up,
    )  # fmt: skip
    hidden, hidden_s = _silu_mul(gate_up, gran2[1], activation_scale)
    products = torch.empty(slots, w2.shape[1], dtype=x.dtype, device=x.device)
    grouped_gemm_kernel.launch(
        hidden, hidden_s, unit_stride(w2), unit_stride(kernel_scale(sf2)), c2, _pair(gran2), order,
        None if weight_on_input else weights, tiles, topk, False, config2, products,
    )  # fmt: skip
    grouped_gemm_kernel.combine(products, topk_ids.contiguous(), E, out)
    return out


def batched_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    counts: torch.Tensor,
    gran13: Sequence[int],
    gran2: Sequence[int],
    activation_scale: str,
    out: torch.Tensor | None = None,
    *,
    block_scaled: bool = False,
) -> torch.Tensor:
    """Each expert of its own rows; see reference.batched_experts. out is contiguous."""
    (E, T, H), N = x.shape, w13.shape[1]
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert out.is_contiguous(), f"{out.stride()=}"
    if out.numel() == 0:
        return out
    counts, rows = counts.contiguous(), min(T, BATCHED_ROWS)
    cores = block_scaled, one_warp_products(x.device)
    a, a_s = _quantize(x, gran13[1], activation_scale, counts)
    if N <= H:  # out is written when gate_up has been read, so this largest buffer may lie there
        gate_up = out.view(-1)[: E * T * N].view(E, T, N)
    else:
        gate_up = torch.empty(E, T, N, dtype=x.dtype, device=x.device)
    batched_gemm_kernel.launch(
        a, a_s, unit_stride(w13), unit_stride(kernel_scale(sf13)), c13, _pair(gran13), counts,
        gemm_kernel.tile_config(rows, a.dtype, _pair(gran13), *cores), gate_up,
    )  # fmt: skip
    del a, a_s  # hidden may take their memory
    hidden, hidden_s = _silu_mul(gate_up, gran2[1], activation_scale, counts)
    batched_gemm_kernel.launch(
        hidden, hidden_s, unit_stride(w2), unit_stride(kernel_scale(sf2)), c2, _pair(gran2), counts,
        gemm_kernel.tile_config(rows, hidden.dtype, _pair(gran2), *cores), out,
    )  # fmt: skip
    return out


def _route(
    topk_ids: torch.Tensor, num_experts: int, block_m: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Slots by expert, and tiles of block_m of them: what grouped_gemm.py's docstring names."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    experts = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = torch.sort(experts, stable=True).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    counts = counts[:num_experts]
    ends, tiles = counts.cumsum(0), (counts + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    slots = ids.numel()
    # Every expert with rows has at most one tile that is not full.
    bound = min(slots, (slots + num_experts * (block_m - 1)) // block_m)
    tile = torch.arange(bound, device=ids.device)
    tile_expert = torch.searchsorted(tile_ends, tile, right=True)
    e = tile_expert.clamp(max=num_experts - 1)
    tile_start = (ends - counts)[e] + (tile - (tile_ends - tiles)[e]) * block_m
    return order, (tile_expert, tile_start, ends)


def _quantize(
    x: torch.Tensor, group: int, activation_scale: str, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if activation_scale == "none":
        return unit_stride(x), None
    return act_quant(x, group, activation_scale == "ue8m0", counts=counts)


def _silu_mul(
    gate_up: torch.Tensor, group: int, activation_scale: str, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) * up of [..., 2 I], quantized as activation_scale says."""
    if activation_scale == "none":
        return silu_mul(gate_up, counts), None
    return silu_mul_quant(gate_up, group, activation_scale == "ue8m0", counts=counts)


def _pair(gran: Sequence[int]) -> tuple[int, int]:
    """Torch ops pass int[] as a list."""
    return gran[0], gran[1]
