"""Where routed experts' rows go: slots sorted by expert, and tiles of one expert's rows.

A slot is a (token, k) pair, numbered token * topk + k. topk_ids holds experts, or with expert_map
global ones that it translates; what is not in [0, E) afterwards is skipped.

destinations [slots] int32   sorted row of each slot, -1: skipped
order [slots] int32          slot of each sorted row; past the last row undefined
scale_rows [slots] int32     a slot's row of scales, where tile t starts at row t * pitch
tiles [T, 6] int32           expert, first row, end of the tile's rows; first of the expert's tiles,
                             and their number; first row of scales; past the last tile undefined
num_tiles [1] int32          tiles that are used: T is a bound, so the host needs no counts
progress [T + 1] int32       zeros, for expert_chain: units that were taken; what is done of a tile
tall                         tiles PREFILL_ROWS high of the experts that would have more than
                             `most` of the others, which then have none of those; no tall
                             ones if they would take the place of fewer than `least`

Scales have rows of their own because the copy engine takes parts of their columns, and those may
begin at multiples of 16 bytes only: elsewhere it is an illegal instruction.

The order of one expert's rows is that of atomic additions: it changes, but no row's result depends
on it. counts [E + 1], the last of which is of programs that are done, are zeros before and after.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from .config import dependent_launch
from .expert_config import PREFILL_ROWS, most_tiles
from .replay import Launch, launched
from .tile import wait_for_inputs

SLOTS = 1024  # a program's
TILE_FIELDS = tl.constexpr(6)
LEAST_PITCH = tl.constexpr(16)


@triton.jit
def slot_experts(topk_ids, expert_map, slot, slots, num_experts, num_global):
    """(Expert of each slot, whether it is here)."""
    expert = tl.load(topk_ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    if expert_map is not None:
        known = (expert >= 0) & (expert < num_global)
        expert = tl.load(expert_map + expert, mask=known, other=-1).to(tl.int32)
    return expert, (expert >= 0) & (expert < num_experts)


@triton.jit
def _place(
    starts, expert, rank, used, slot, slots, destinations, order, scale_rows, num_experts,
    ROWS: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    row = tl.load(starts + expert, mask=used, other=0) + rank
    place = tl.load(starts + num_experts + expert, mask=used, other=0)
    tl.store(scale_rows + slot, place + rank // ROWS * PITCH + rank % ROWS, mask=used)
    tl.store(destinations + slot, tl.where(used, row, -1), mask=slot < slots)
    tl.store(order + row, slot, mask=used)


@triton.jit
def _list_tiles(
    tiles, num_tiles, e, start, count, place, used, ROWS: tl.constexpr, PITCH: tl.constexpr
):
    """Those of experts e [EXPERTS] that are used, whose first row of scales is at place."""
    each = tl.where(used, tl.cdiv(count, ROWS), 0)
    ends = tl.cumsum(each, 0)
    tl.store(num_tiles, tl.max(ends, 0))
    for i in range(tl.max(each, 0)):
        entry = tiles + (ends - each + i) * TILE_FIELDS
        first = start + i * ROWS
        tl.store(entry, e, mask=i < each)
        tl.store(entry + 1, first, mask=i < each)
        tl.store(entry + 2, tl.minimum(first + ROWS, start + count), mask=i < each)
        tl.store(entry + 3, ends - each, mask=i < each)
        tl.store(entry + 4, each, mask=i < each)
        tl.store(entry + 5, place + i * PITCH, mask=i < each)


@triton.jit(do_not_specialize=["slots", "most", "least", "length"])
def _count_kernel(
    topk_ids, expert_map, counts, starts, destinations, order, scale_rows, tiles, num_tiles,
    tall_tiles, num_tall, progress, most, least, length, slots, num_experts, num_global,
    ROWS: tl.constexpr, PITCH: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    ONE: tl.constexpr, TALL_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ranks of the slots among their expert's -> destinations; the last program to end: tiles."""
    wait_for_inputs(PDL)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert, used = slot_experts(topk_ids, expert_map, slot, slots, num_experts, num_global)
    rank = tl.atomic_add(counts + expert, 1, mask=used, sem="relaxed")
    tl.store(destinations + slot, rank, mask=used)
    tl.debug_barrier()
    done = counts + num_experts
    if tl.atomic_add(done, 1) == tl.num_programs(0) - 1:
        e = tl.arange(0, EXPERTS)
        count = tl.load(counts + e, mask=e < num_experts, other=0, volatile=True)
        tl.store(counts + e, 0, mask=e < num_experts)
        tl.store(done, 0)
        if progress is not None:
            for i in range(0, length, EXPERTS):
                tl.store(progress + i + e, 0, mask=i + e < length)
        start = tl.cumsum(count, 0) - count
        tl.store(starts + e, start, mask=e < num_experts)
        each = tl.cdiv(count, ROWS)
        place = (tl.cumsum(each, 0) - each) * PITCH
        tl.store(starts + num_experts + e, place, mask=e < num_experts)
        if tall_tiles is None:
            _list_tiles(tiles, num_tiles, e, start, count, place, each > 0, ROWS, PITCH)
        else:
            high = each > most
            high &= tl.sum(tl.where(high, each, 0), 0) >= least
            _list_tiles(tiles, num_tiles, e, start, count, place, ~high, ROWS, PITCH)
            _list_tiles(tall_tiles, num_tall, e, start, count, place, high, TALL_ROWS, TALL_ROWS)
        if ONE:
            tl.debug_barrier()
            _place(
                starts, expert, rank, used, slot, slots, destinations, order, scale_rows,
                num_experts, ROWS, PITCH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def _place_kernel(
    topk_ids, expert_map, starts, destinations, order, scale_rows, slots, num_experts, num_global,
    ROWS: tl.constexpr, PITCH: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert, used = slot_experts(topk_ids, expert_map, slot, slots, num_experts, num_global)
    rank = tl.load(destinations + slot, mask=used, other=0)
    _place(
        starts, expert, rank, used, slot, slots, destinations, order, scale_rows, num_experts,
        ROWS, PITCH,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """As above. order None: a row's result goes to that row."""

    tiles: torch.Tensor
    num_tiles: torch.Tensor
    order: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Routing(Tiles):
    """As above. scale_rows None: scales are there already. tall, progress None: there are none."""

    destinations: torch.Tensor
    scale_rows: torch.Tensor | None = None
    tall: Tiles | None = None
    progress: torch.Tensor | None = None


def scale_pitch(rows: int) -> int:
    """Rows of scales from one tile to the next, whatever a scale takes."""
    return max(rows, LEAST_PITCH.value)


def programs(slots: int) -> int:
    """Those of a launch; a single one needs no second launch."""
    return triton.cdiv(slots, SLOTS)


def _empty_tiles(most: int, order: torch.Tensor | None, device: torch.device) -> Tiles:
    kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
    tiles = torch.empty(most, TILE_FIELDS.value, **kind)
    return Tiles(tiles=tiles, num_tiles=torch.empty(1, **kind), order=order)


def empty_routing(
    topk_ids: torch.Tensor, num_experts: int, rows: int, most: int, chained: bool
) -> Routing:
    """Its tensors; as `launch`, without scale_rows."""
    slots, device = topk_ids.numel(), topk_ids.device
    order = torch.empty(slots, dtype=torch.int32, device=device)
    tiles = _empty_tiles(most_tiles(slots, num_experts, rows), order, device)
    tall = progress = None
    if most:
        assert rows == scale_pitch(rows), "scales of tall tiles are not in one piece"
        popular = min(num_experts, slots // (most * rows + 1))
        tall = _empty_tiles(most_tiles(slots, popular, PREFILL_ROWS), order, device)
    if chained:
        progress = torch.empty(len(tiles.tiles) + 1, dtype=torch.int32, device=device)
    destinations = torch.empty(topk_ids.shape, dtype=torch.int32, device=device)
    return Routing(
        tiles=tiles.tiles, num_tiles=tiles.num_tiles, order=order, destinations=destinations,
        tall=tall, progress=progress,
    )  # fmt: skip


def launch(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, rows: int,
    counts: torch.Tensor, most: int = 0, least: int = 0, chained: bool = False,
) -> Routing:  # fmt: skip
    """Tiles of `rows` rows; destinations [M, topk]. most: see tall, 16 rows at least; 0: without.

    counts [E + 1] int32 zeros, the last of which is `done`. chained: with progress.
    """
    slots, device = topk_ids.numel(), topk_ids.device
    routing = empty_routing(topk_ids, num_experts, rows, most, chained)
    starts = torch.empty(2 * num_experts, dtype=torch.int32, device=device)  # rows, then scales'
    routing = replace(routing, scale_rows=torch.empty_like(routing.destinations))
    _launch_count(topk_ids, expert_map, num_experts, rows, counts, starts, routing, most, least)
    if programs(slots) > 1:
        _launch_place(topk_ids, expert_map, num_experts, rows, starts, routing)
    return routing


@launched
def _launch_count(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, rows: int,
    counts: torch.Tensor, starts: torch.Tensor, routing: Routing, most: int, least: int,
) -> Launch:  # fmt: skip
    slots, high, progress = topk_ids.numel(), routing.tall, routing.progress
    return Launch(
        _count_kernel, (programs(slots),),
        topk_ids, expert_map, counts, starts, routing.destinations, routing.order,
        routing.scale_rows, routing.tiles, routing.num_tiles,
        None if high is None else high.tiles, None if high is None else high.num_tiles,
        progress, most, least, 0 if progress is None else len(progress), slots, num_experts,
        0 if expert_map is None else len(expert_map),
        EXPERTS=triton.next_power_of_2(num_experts), ONE=programs(slots) == 1,
        TALL_ROWS=PREFILL_ROWS, **_sizes(rows), **dependent_launch(topk_ids.device),
    )  # fmt: skip


@launched
def _launch_place(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, rows: int,
    starts: torch.Tensor, routing: Routing,
) -> Launch:  # fmt: skip
    slots = topk_ids.numel()
    return Launch(
        _place_kernel, (programs(slots),),
        topk_ids, expert_map, starts, routing.destinations, routing.order, routing.scale_rows,
        slots, num_experts, 0 if expert_map is None else len(expert_map),
        **_sizes(rows), **dependent_launch(topk_ids.device),
    )  # fmt: skip


def _sizes(rows: int) -> dict[str, int]:
    return {"ROWS": rows, "PITCH": scale_pitch(rows), "SLOTS": SLOTS, "num_warps": 8}


@triton.jit(do_not_specialize=["T"])
def _tiles_kernel(
    counts, scale_rows, tiles, num_tiles, E, T,
    ROWS: tl.constexpr, PITCH: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e: the tiles of expert e, BLOCK rows and tiles at a time."""
    wait_for_inputs(PDL)
    e, expert = tl.arange(0, EXPERTS), tl.program_id(0)
    count = tl.minimum(tl.load(counts + e, mask=e < E, other=0).to(tl.int32), T)
    each = tl.cdiv(count, ROWS)
    first = tl.sum(tl.where(e < expert, each, 0), 0)
    number = tl.sum(tl.where(e == expert, each, 0), 0)
    count = tl.sum(tl.where(e == expert, count, 0), 0)
    if expert == 0:
        tl.store(num_tiles, tl.sum(each, 0))
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = (first + i // ROWS) * PITCH + i % ROWS
        tl.store(scale_rows + expert * T + i, place, mask=i < count)
        entry, row, used = tiles + (first + i) * TILE_FIELDS, expert * T + i * ROWS, i < number
        tl.store(entry, expert, mask=used)
        tl.store(entry + 1, row, mask=used)
        tl.store(entry + 2, tl.minimum(row + ROWS, expert * T + count), mask=used)
        tl.store(entry + 3, first, mask=used)
        tl.store(entry + 4, number, mask=used)
        tl.store(entry + 5, (first + i) * PITCH, mask=used)


def batched_tiles(counts: torch.Tensor, T: int, rows: int) -> tuple[Tiles, torch.Tensor]:
    """Of expert e the rows e * T to e * T + counts[e]: (tiles, scale_rows [E, T])."""
    E, device = len(counts), counts.device
    scale_rows = torch.empty(E, T, dtype=torch.int32, device=device)
    tiles = _empty_tiles(E * triton.cdiv(T, rows), None, device)
    _tiles_kernel[(E,)](
        counts, scale_rows, tiles.tiles, tiles.num_tiles, E, T,
        ROWS=rows, PITCH=scale_pitch(rows), EXPERTS=triton.next_power_of_2(E), BLOCK=256,
        num_warps=4, **dependent_launch(device),
    )  # fmt: skip
    return tiles, scale_rows
