"""Routed experts: sort, quantize, gated product, product, sum.

one token    expert_decode twice: every slot is a tile, x is quantized inside, the second sums;
             wide experts, which fill the SMs, as few rows
few rows     route and act_quant to sorted rows (few slots: route_quant), expert_chain, combine
many rows    the same with expert_prefill twice
batched      act_quant and expert_decode twice, on rows where they are
otherwise    portable's kernels: see `refusal`
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .. import portable
from ..formats import BLOCK, SF_FLOOR
from ..kernels import (
    act_quant,
    expert_chain,
    expert_decode,
    expert_prefill,
    grouped_gemm,
    route,
    route_quant,
)
from ..kernels.config import MASKED_TILE, act_quant_config, batch_invariant
from ..kernels.expert_config import batched_config, experts_config, most_tiles
from ..kernels.hopper_config import device_of
from ..layouts import ceil_div, empty_scale
from ..portable.quant import kernel_scale, unit_stride
from .counters import counters
from .products import E4M3

LAYOUT = "mn_major"


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
) -> torch.Tensor:
    """Routed experts; see reference.experts. Ids outside [0, E) are skipped."""
    if refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is not None:
        return portable.experts(
            x, w13, sf13, c13, w2, sf2, c2, topk_weights, topk_ids, gran13, gran2,
            activation_scale, weight_on_input, expert_map, out,
        )  # fmt: skip
    (M, topk), (E, N, H), device = topk_ids.shape, w13.shape, x.device
    slots, ue8m0, I = M * topk, activation_scale == "ue8m0", N // 2  # noqa: E741
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if slots == 0:
        return out.zero_()
    _, sms = device_of(device.index)
    num_global = E if expert_map is None else len(expert_map)
    config = experts_config(M, topk, E, num_global, H, I, 1 if ue8m0 else 4, batch_invariant(), sms)
    source = x * topk_weights.to(x.dtype) if weight_on_input else x
    weights = None if weight_on_input else topk_weights.reshape(-1)
    ids = topk_ids.contiguous()
    tiles = slots if config.one_token else most_tiles(slots, E, config.rows)
    scale_rows = tiles * route.scale_pitch(config.rows)
    hidden, hidden_s = _empty_quantized(slots, I, scale_rows, ue8m0, device)
    products = torch.empty(slots, H, dtype=x.dtype, device=device)
    first = (w13, kernel_scale(sf13), c13, hidden, hidden_s)
    down_operands = (w2, kernel_scale(sf2), c2, products)
    second = (hidden, hidden_s, *down_operands, None)
    quantization: dict[str, Any] = {"ue8m0": ue8m0, "floor": SF_FLOOR, "dtype": x.dtype}

    if config.one_token:
        gated, down = config.gated, config.down
        assert gated is not None
        assert down is not None
        count = counters(w13, max(topk * ceil_div(I, BLOCK), ceil_div(H, down.block_n)))
        token: dict[str, Any] = quantization | {
            "routing": None, "ids": ids.view(-1), "expert_map": expert_map, "counters": count,
            "rows": config.rows,
        }  # fmt: skip
        expert_decode.launch(
            source.contiguous(), None, *first, slot_weights=None, combined=None, config=gated,
            **token,
        )  # fmt: skip
        expert_decode.launch(*second, slot_weights=weights, combined=out, config=down, **token)
        return out

    a, a_s = _empty_quantized(slots, H, scale_rows, ue8m0, device)
    source = unit_stride(source)
    chained = config.chain is not None
    if route_quant.takes(M, topk) and not config.tall:
        routing = route_quant.launch(
            source, a, a_s, ids, expert_map, E, config.rows, SF_FLOOR, chained
        )
    else:
        routing = route.launch(
            ids, expert_map, E, config.rows, counters(w2, E + 1), config.tall, config.least_tall,
            chained,
        )  # fmt: skip
        act_quant.launch(
            source[None], a, a_s[None], BLOCK, SF_FLOOR, True,
            act_quant_config(M, ceil_div(H, BLOCK), True),
            destinations=routing.destinations, scale_rows=routing.scale_rows,
        )  # fmt: skip
    tall: route.Tiles | None = routing
    if config.chain is not None:
        expert_chain.launch(
            a, a_s, *first, *down_operands, slot_weights=weights, routing=routing,
            rows=config.rows, stages=config.chain, programs=sms, **quantization,
        )  # fmt: skip
        tall = routing.tall
    if tall is not None:
        many: dict[str, Any] = quantization | {"routing": tall, "programs": sms}
        one, other = counters(w2, 64)[:1], counters(w13, 64)[:1]
        expert_prefill.launch(a, a_s, *first, slot_weights=None, counter=one, **many)
        expert_prefill.launch(*second, slot_weights=weights, counter=other, **many)
    grouped_gemm.combine(products, routing.destinations, slots, out)
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
) -> torch.Tensor:
    """Each expert of its own rows; see reference.batched_experts. out is contiguous."""
    if refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is not None:
        return portable.batched_experts(
            x, w13, sf13, c13, w2, sf2, c2, counts, gran13, gran2, activation_scale, out
        )
    (E, T, H), N, device = x.shape, w13.shape[1], x.device
    rows, ue8m0, I = E * T, activation_scale == "ue8m0", N // 2  # noqa: E741
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert out.is_contiguous(), f"{out.stride()=}"
    if out.numel() == 0:
        return out
    _, sms = device_of(device.index)
    config, counts = batched_config(T, H, I, 1 if ue8m0 else 4, sms), counts.contiguous()
    gated, down = config.gated, config.down
    assert gated is not None
    assert down is not None
    tiles, scale_rows = route.batched_tiles(counts, T, config.rows)
    places = len(tiles.tiles) * route.scale_pitch(config.rows)
    a, a_s = _empty_quantized(rows, H, places, ue8m0, device)
    act_quant.launch(
        unit_stride(x), a.view(E, T, H), a_s[None], BLOCK, SF_FLOOR, True, MASKED_TILE, counts,
        scale_rows=scale_rows,
    )  # fmt: skip
    hidden, hidden_s = _empty_quantized(rows, I, places, ue8m0, device)
    few: dict[str, Any] = {
        "routing": tiles, "ids": None, "expert_map": None, "slot_weights": None, "combined": None,
        "counters": None, "rows": config.rows, "ue8m0": ue8m0, "floor": SF_FLOOR, "dtype": x.dtype,
    }  # fmt: skip
    expert_decode.launch(
        a, a_s, w13, kernel_scale(sf13), c13, hidden, hidden_s, config=gated, **few
    )
    expert_decode.launch(
        hidden, hidden_s, w2, kernel_scale(sf2), c2, out.view(rows, H), None, config=down, **few
    )
    return out


def experts_plan(
    x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, w2: torch.Tensor, sf2: torch.Tensor,
    gran13: Sequence[int], gran2: Sequence[int], activation_scale: str, topk: int, num_global: int,
) -> Callable[[int], Hashable]:  # fmt: skip
    """What `experts` launches, by the number of tokens: equal plans are equal kernels."""
    if refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is not None:
        return portable.experts_plan(
            x, w13, sf13, w2, sf2, gran13, gran2, activation_scale, topk, num_global
        )
    (E, N, H), (_, sms) = w13.shape, device_of(x.device.index)
    sizes = E, num_global, H, N // 2, 1 if activation_scale == "ue8m0" else 4

    def plan(M: int) -> Hashable:
        config, slots = experts_config(M, topk, *sizes, batch_invariant(), sms), M * topk
        if config.one_token:
            return config
        if route_quant.takes(M, topk) and not config.tall:
            return config, route_quant.seen_slots(slots), route_quant.program_groups(M)
        one = route.programs(slots) == 1
        return config, one, act_quant_config(M, ceil_div(H, BLOCK), True)

    return plan


def _empty_quantized(
    rows: int, K: int, scale_rows: int, ue8m0: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, K], and scales at rows of their own: see route.py."""
    codes = torch.empty(rows, K, dtype=E4M3, device=device)
    return codes, empty_scale((), scale_rows, ceil_div(K, BLOCK), ue8m0, LAYOUT, device)


def refusal(
    x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, w2: torch.Tensor, sf2: torch.Tensor,
    gran13: Sequence[int], gran2: Sequence[int], activation_scale: str,
) -> str | None:  # fmt: skip
    """Why the sm_90 kernels do not run these experts, or None."""
    if activation_scale == "none":
        return "activations are not quantized"
    if x.dtype == torch.float32:
        return "activations are float32"
    for name, gran in (("w13", gran13), ("w2", gran2)):
        if tuple(gran) != (BLOCK, BLOCK):
            return f"{name}: scale blocks of {gran[0]}x{gran[1]}, not {BLOCK}x{BLOCK}"
    for name, w, sf in (("w13", w13, sf13), ("w2", w2, sf2)):
        if not w.is_contiguous() or w.data_ptr() % 16 or w.shape[-1] % 16:
            return f"{name} is not contiguous with rows at multiples of 16 bytes"
        if not sf.is_contiguous():
            return f"scales of {name} are not contiguous"
    if w13.dtype != E4M3 or w13.shape[1] % (2 * BLOCK):
        return f"intermediate size {w13.shape[1] // 2} is not a multiple of {BLOCK}"
    return None
