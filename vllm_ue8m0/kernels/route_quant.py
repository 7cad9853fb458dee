"""Routing (route.py) and quantization (act_quant.py) of few slots in one launch.

Each program quantizes GROUPS groups of a token. Where its copies go it finds by itself: it compares
all slots with each other, which takes less time than to ask other programs through memory. Rows of
an expert are in the order of their slots.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .config import FMA, dependent_launch
from .replay import Launch, launched
from .route import TILE_FIELDS, Routing, empty_routing, scale_pitch, slot_experts
from .tile import wait_for_inputs
from .ue8m0 import quantize, to_float

MOST_SLOTS, CHUNK = 128, 64  # 64 comparisons a thread at a time
GROUP, GROUPS, WARPS = 128, 4, 8


@triton.jit(do_not_specialize=["slots", "stride_s"])
def _route_quant_kernel(
    x, q, s, topk_ids, expert_map, destinations, order, tiles, num_tiles, progress, K, groups,
    stride_xm, stride_s, slots, num_experts, num_global,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, COPIES: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    PITCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOPK, SLOTS: powers of two, at least the COPIES of a token and the slots of all."""
    wait_for_inputs(PDL)
    columns = tl.cdiv(groups, GROUPS)
    token, first_group = tl.program_id(0) // columns, tl.program_id(0) % columns * GROUPS
    k = first_group * GROUP + tl.arange(0, GROUPS * GROUP)
    values = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=k < K, other=0.0)

    j = tl.arange(0, SLOTS)
    expert, used = slot_experts(topk_ids, expert_map, j, slots, num_experts, num_global)
    expert = tl.where(used, expert, -1)
    rank = tl.zeros([SLOTS], tl.int32)
    for start in tl.static_range(0, SLOTS, CHUNK):
        i = start + tl.arange(0, CHUNK)
        other, _ = slot_experts(topk_ids, expert_map, i, slots, num_experts, num_global)
        earlier = (other[:, None] == expert[None, :]) & (i[:, None] < j[None, :])
        rank += tl.sum(earlier.to(tl.int32), 0)
    begins = used & (rank % ROWS == 0)  # a tile

    copy = tl.arange(0, TOPK)
    slot = token * COPIES + copy
    mine, here = slot_experts(topk_ids, expert_map, slot, slots, num_experts, num_global)
    here &= copy < COPIES
    less = used[None, :] & (expert[None, :] < mine[:, None])
    same = expert[None, :] == mine[:, None]
    rank = tl.sum((same & (j[None, :] < slot[:, None])).to(tl.int32), 1)
    count = tl.sum(same.to(tl.int32), 1)
    start = tl.sum(less.to(tl.int32), 1)
    tile = tl.sum((less & begins[None, :]).to(tl.int32), 1) + rank // ROWS
    row = tl.where(here, start + rank, -1)
    scale_row = tile * PITCH + rank % ROWS

    if first_group == 0:
        tl.store(destinations + slot, row, mask=copy < COPIES)
        tl.store(order + row, slot, mask=here)
        entry, first = tiles + tile * TILE_FIELDS, here & (rank % ROWS == 0)
        tl.store(entry, mine, mask=first)
        tl.store(entry + 1, row, mask=first)
        tl.store(entry + 2, tl.minimum(row + ROWS, start + count), mask=first)
        tl.store(entry + 3, tile - rank // ROWS, mask=first)
        tl.store(entry + 4, tl.cdiv(count, ROWS), mask=first)
        tl.store(entry + 5, scale_row, mask=first)
        tl.store(num_tiles, tl.sum(begins.to(tl.int32), 0))
        if token == 0:
            tl.store(progress + j, 0, mask=j < slots)
            tl.store(progress + slots, 0)

    ue8m0: tl.constexpr = s.dtype.element_ty == tl.uint8
    codes, scale = quantize(tl.reshape(to_float(values), [GROUPS, GROUP]), ue8m0, FLOOR)
    codes, scale = tl.reshape(codes, [GROUPS * GROUP]), tl.reshape(scale, [GROUPS])
    group = first_group + tl.arange(0, GROUPS)
    for i in tl.static_range(COPIES):
        target = tl.sum(tl.where(copy == i, row, 0), 0).to(tl.int64)
        place = tl.sum(tl.where(copy == i, scale_row, 0), 0)
        some = tl.where(target >= 0, 1, 0)
        tl.store(q + target * K + k, codes, mask=k < K * some)
        tl.store(s + group.to(tl.int64) * stride_s + place, scale, mask=group < groups * some)


def compared_slots(slots: int) -> int:
    """What every program compares, of `slots` and padding."""
    return triton.next_power_of_2(slots)


def launch(
    x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, num_experts: int, rows: int, floor: int,
) -> Routing:  # fmt: skip
    """x [M, K], unit stride along K -> q and column-major s at the rows of the routing to tiles of
    `rows` rows. topk_ids [M, topk] of at most MOST_SLOTS slots.
    """
    routing = empty_routing(topk_ids, num_experts, rows)
    progress = torch.empty(topk_ids.numel() + 1, dtype=torch.int32, device=x.device)
    routing = replace(routing, progress=progress)
    _launch(x, q, s, topk_ids, expert_map, num_experts, rows, floor, routing)
    return routing


@launched
def _launch(
    x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, num_experts: int, rows: int, floor: int, routing: Routing,
) -> Launch:  # fmt: skip
    (M, K), topk = x.shape, topk_ids.shape[1]
    groups, slots = triton.cdiv(K, GROUP), compared_slots(M * topk)
    return Launch(
        _route_quant_kernel, (M * triton.cdiv(groups, GROUPS),),
        x, q.view(torch.uint8), s, topk_ids, expert_map, routing.destinations, routing.order,
        routing.tiles, routing.num_tiles, routing.progress, K, groups,
        x.stride(0) if M > 1 else K, s.stride(1), M * topk, num_experts,
        0 if expert_map is None else len(expert_map),
        FLOOR=floor, GROUP=GROUP, GROUPS=GROUPS, COPIES=topk, TOPK=triton.next_power_of_2(topk),
        SLOTS=slots, CHUNK=min(slots, CHUNK), ROWS=rows, PITCH=scale_pitch(rows),
        num_warps=WARPS, **dependent_launch(x.device), **FMA,
    )  # fmt: skip
