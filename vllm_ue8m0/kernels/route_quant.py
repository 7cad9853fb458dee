"""Routing (route.py) and quantization (act_quant.py) of few slots in one launch.

Each program quantizes GROUPS groups of a token. Where its copies go it finds by itself: it counts
every expert's slots, or compares very few with each other, and asks no other program, which would
take longer. Rows of an expert are in the order of their slots.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, dependent_launch
from .replay import Launch, launched
from .route import TILE_FIELDS, Routing, empty_routing, scale_pitch, slot_experts
from .tile import wait_for_inputs
from .ue8m0 import quantize, to_float

MOST_TOKENS, MOST_SLOTS = 64, 512
# Slots that are compared. One token's served on an H200, 2026-11-30: 2.4 us, 3.0 where they are
# counted; 16 tokens' 6.0, where they are counted 4.0.
COMPARED = tl.constexpr(32)
GROUP, WARPS = 128, 8


@triton.jit
def _compare(expert, used, j, mine, ROWS: tl.constexpr):
    """Of experts `mine` the first row, the end, the first tile and their number; that of all."""
    earlier = (expert[None, :] == expert[:, None]) & (j[None, :] < j[:, None])
    begins = used & (tl.sum(earlier.to(tl.int32), 1) % ROWS == 0)
    less = used[None, :] & (expert[None, :] < mine[:, None])
    same = expert[None, :] == mine[:, None]
    start = tl.sum(less.to(tl.int32), 1)
    place = tl.sum((less & begins[None, :]).to(tl.int32), 1)
    number = tl.sum((same & begins[None, :]).to(tl.int32), 1)
    end = start + tl.sum(same.to(tl.int32), 1)
    return start, end, place, number, tl.sum(begins.to(tl.int32), 0)


@triton.jit
def _count(expert, used, mine, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The same, from all experts' numbers of rows."""
    counts = tl.histogram(tl.where(used, expert, 0), EXPERTS, mask=used)
    tiles = tl.cdiv(counts, ROWS)
    start = tl.gather(tl.cumsum(counts, 0) - counts, mine, 0)
    end = start + tl.gather(counts, mine, 0)
    place = tl.gather(tl.cumsum(tiles, 0) - tiles, mine, 0)
    return start, end, place, tl.gather(tiles, mine, 0), tl.sum(tiles, 0)


@triton.jit(do_not_specialize=["slots", "stride_s", "length"])
def _route_quant_kernel(
    x, q, s, topk_ids, expert_map, destinations, order, tiles, num_tiles, progress, length, K,
    groups, stride_xm, stride_s, slots, num_experts, num_global,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, COPIES: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    PITCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOPK, SLOTS, EXPERTS: powers of two, at least a token's COPIES, all slots, all experts."""
    wait_for_inputs(PDL)
    columns = tl.cdiv(groups, GROUPS)
    token, first_group = tl.program_id(0) // columns, tl.program_id(0) % columns * GROUPS
    k = first_group * GROUP + tl.arange(0, GROUPS * GROUP)
    values = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=k < K, other=0.0)

    j, copy = tl.arange(0, SLOTS), tl.arange(0, TOPK)
    expert, used = slot_experts(topk_ids, expert_map, j, slots, num_experts, num_global)
    slot = token * COPIES + copy
    mine, here = slot_experts(topk_ids, expert_map, slot, slots, num_experts, num_global)
    here &= copy < COPIES
    mine = tl.where(here, mine, 0)

    if SLOTS <= COMPARED:
        start, end, place, number, total = _compare(expert, used, j, mine, ROWS)
    else:
        start, end, place, number, total = _count(expert, used, mine, ROWS, EXPERTS)
    earlier = (expert[None, :] == mine[:, None]) & (j[None, :] < slot[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    row = tl.where(here, start + rank, -1)
    tile = place + rank // ROWS
    scale_row = tile * PITCH + rank % ROWS

    if first_group == 0:
        tl.store(destinations + slot, row, mask=copy < COPIES)
        tl.store(order + row, slot, mask=here)
        entry, first = tiles + tile * TILE_FIELDS, here & (rank % ROWS == 0)
        tl.store(entry, mine, mask=first)
        tl.store(entry + 1, row, mask=first)
        tl.store(entry + 2, tl.minimum(row + ROWS, end), mask=first)
        tl.store(entry + 3, place, mask=first)
        tl.store(entry + 4, number, mask=first)
        tl.store(entry + 5, scale_row, mask=first)
        tl.store(num_tiles, total)
        if token == 0 and progress is not None:
            tl.store(progress + j, 0, mask=j < length)
            tl.store(progress + length - 1, 0)

    ue8m0: tl.constexpr = s.dtype.element_ty == tl.uint8
    codes, scale = quantize(tl.reshape(to_float(values), [GROUPS, GROUP]), ue8m0, FLOOR)
    codes, scale = tl.reshape(codes, [GROUPS * GROUP]), tl.reshape(scale, [GROUPS])
    group = first_group + tl.arange(0, GROUPS)
    for i in tl.static_range(COPIES):
        target = tl.sum(tl.where(copy == i, row, 0), 0).to(tl.int64)
        scale_place = tl.sum(tl.where(copy == i, scale_row, 0), 0)
        some = tl.where(target >= 0, 1, 0)
        tl.store(q + target * K + k, codes, mask=k < K * some)
        place_s = s + group.to(tl.int64) * stride_s + scale_place
        tl.store(place_s, scale, mask=group < groups * some)


def takes(M: int, topk: int) -> bool:
    """Whether that is faster than to ask other programs."""
    return M <= MOST_TOKENS and M * topk <= MOST_SLOTS


def seen_slots(slots: int) -> int:
    """What every program counts or compares, of `slots` and padding."""
    return triton.next_power_of_2(slots)


def counted_experts(num_experts: int) -> int:
    """Bins of the histogram, whose warps have one for each thread at least."""
    return max(32, triton.next_power_of_2(num_experts))


def program_groups(M: int) -> int:
    """What a program quantizes: more of many tokens, for which counting is most of the work.

    64 tokens beside shared experts on an H200, 2026-11-30: 6.2 us by 32 groups, 8.6 by 8.
    """
    return 4 if M <= 16 else 16 if M <= 32 else 32


def launch(
    x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, num_experts: int, rows: int, floor: int, chained: bool,
) -> Routing:  # fmt: skip
    """x [M, K], unit stride along K -> q and column-major s at the rows of the routing to tiles of
    `rows` rows. topk_ids [M, topk] that `takes` takes. chained: with progress.
    """
    routing = empty_routing(topk_ids, num_experts, rows, 0, chained)
    _launch(x, q, s, topk_ids, expert_map, num_experts, rows, floor, routing)
    return routing


@launched
def _launch(
    x: torch.Tensor, q: torch.Tensor, s: torch.Tensor, topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None, num_experts: int, rows: int, floor: int, routing: Routing,
) -> Launch:  # fmt: skip
    (M, K), topk = x.shape, topk_ids.shape[1]
    groups, each, progress = triton.cdiv(K, GROUP), program_groups(M), routing.progress
    return Launch(
        _route_quant_kernel, (M * triton.cdiv(groups, each),),
        x, q.view(torch.uint8), s, topk_ids, expert_map, routing.destinations, routing.order,
        routing.tiles, routing.num_tiles, progress, 0 if progress is None else len(progress), K,
        groups, x.stride(0) if M > 1 else K, s.stride(1), M * topk, num_experts,
        0 if expert_map is None else len(expert_map),
        FLOOR=floor, GROUP=GROUP, GROUPS=each, COPIES=topk, TOPK=triton.next_power_of_2(topk),
        SLOTS=seen_slots(M * topk), EXPERTS=counted_experts(num_experts), ROWS=rows,
        PITCH=scale_pitch(rows), num_warps=WARPS, **dependent_launch(x.device), **FMA,
    )  # fmt: skip
