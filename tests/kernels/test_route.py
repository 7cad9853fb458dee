"""Slots sorted by expert, and tiles; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from checks import same_bits

pytest.importorskip("triton")


def check(topk_ids, num_experts, rows, expert_map=None):
    from vllm_ue8m0.kernels import act_quant, route, route_quant
    from vllm_ue8m0.kernels.config import act_quant_config

    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_ids.device)
    kinds = ((0, 0), (1, 0), (2, 0), (1, 6), (1, 20)) if rows >= 16 else ((0, 0),)
    for tall in kinds:
        routing = route.launch(topk_ids, expert_map, num_experts, rows, counts, *tall, chained=True)
        assert not counts.any()
        assert len(routing.progress) == len(routing.tiles) + 1 and not routing.progress.any()
        slot, scale_rows = check_routing(routing, topk_ids, num_experts, rows, expert_map, *tall)
        assert torch.equal(routing.scale_rows.reshape(-1).cpu()[slot].long(), scale_rows)

    def quantize(x, q, s):
        places = {"destinations": routing.destinations, "scale_rows": routing.scale_rows}
        config = act_quant_config(len(x), 6, True)
        act_quant.launch(x[None], q, s[None], 128, 105, True, config, **places)
        return routing

    if not route_quant.takes(*topk_ids.shape):
        return
    check_quantized(quantize, topk_ids, num_experts, rows, expert_map, *tall)
    for chained in (True, False):

        def route_and_quantize(x, q, s, chained=chained):
            routing = route_quant.launch(
                x, q, s, topk_ids, expert_map, num_experts, rows, 105, chained
            )
            assert routing.scale_rows is None
            assert (routing.progress is not None) == chained
            if chained:
                assert len(routing.progress) == len(routing.tiles) + 1
                assert not routing.progress.any()
            return routing

        check_quantized(route_and_quantize, topk_ids, num_experts, rows, expert_map)


def check_quantized(quantize, topk_ids, num_experts, rows, expert_map, tall=0, least=0):
    """quantize(x, q, s) gives a routing; codes and scales are act_quant's, at the slots' rows."""
    from vllm_ue8m0 import portable
    from vllm_ue8m0.kernels import route
    from vllm_ue8m0.kernels.expert_config import most_tiles
    from vllm_ue8m0.layouts import empty_scale

    M, slots, K, device = len(topk_ids), topk_ids.numel(), 656, topk_ids.device
    x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
    for ue8m0 in (True, False):
        places = most_tiles(slots, num_experts, rows) * route.scale_pitch(rows)
        q = torch.empty(slots, K, dtype=torch.float8_e4m3fn, device=device)
        s = empty_scale((), places, 6, ue8m0, "mn_major", device)
        routing = quantize(x, q, s)
        slot, places = check_routing(routing, topk_ids, num_experts, rows, expert_map, tall, least)
        codes, scales = portable.act_quant(x, 128, ue8m0, 105)
        token = (slot // topk_ids.shape[1]).to(device)
        assert same_bits(q[: len(slot)], codes[token])
        assert same_bits(s[places.to(device)], scales[token])


def check_routing(routing, topk_ids, num_experts, rows, expert_map, tall=0, least=0):
    """Gives the slots in their order, and their rows of scales."""
    from vllm_ue8m0.kernels.expert_config import PREFILL_ROWS

    destinations, order = routing.destinations, routing.order
    experts = topk_ids.reshape(-1).long().cpu()
    if expert_map is not None:
        known = (experts >= 0) & (experts < len(expert_map))
        experts = torch.where(known, expert_map.cpu().long()[experts * known], -1)
    used = (experts >= 0) & (experts < num_experts)
    place = destinations.reshape(-1).long().cpu()
    assert (place[~used] == -1).all()
    # Each row once, and sorted by expert.
    assert sorted(place[used].tolist()) == list(range(int(used.sum())))
    slot = order.long().cpu()[: int(used.sum())]
    assert torch.equal(place[slot], torch.arange(len(slot)))
    assert torch.equal(experts[slot], experts[slot].sort().values)
    low, high, scale_rows, start, place = [], [], [], 0, 0
    counts = [int((experts == expert).sum()) for expert in range(num_experts)]
    replaced = sum(-(-count // rows) for count in counts if count > tall * rows)
    most = tall if replaced >= least else 0
    for expert, count in enumerate(counts):
        pitch = max(rows, 16)
        number = -(-count // rows)
        for i in range(count):
            scale_rows.append(place + i // rows * pitch + i % rows)
        many = 0 < most < number
        listed, step = (high, PREFILL_ROWS) if many else (low, rows)
        first, each = len(listed), -(-count // step)
        for i in range(each):
            tile = start + i * step, start + min((i + 1) * step, count)
            listed.append([expert, *tile, first, each, place + i * (step if many else pitch)])
        start, place = start + count, place + number * pitch
    for tiles, wanted in ((routing, low), (routing.tall, high)):
        if tiles is None:
            assert not wanted
            assert not tall
            continue
        assert tiles.order is order
        assert len(wanted) == int(tiles.num_tiles) <= len(tiles.tiles)
        assert tiles.tiles[: len(wanted)].tolist() == wanted
    return slot, torch.tensor(scale_rows, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("M", "topk", "E", "rows"), [
    (1, 8, 256, 8), (3, 2, 5, 8), (4, 8, 7, 8), (5, 7, 600, 8), (16, 8, 24, 8), (32, 8, 60, 8),
    (21, 6, 3, 16), (40, 3, 2, 64), (64, 8, 256, 16), (65, 7, 9, 16), (17, 31, 40, 16),
    (128, 8, 256, 16), (129, 8, 60, 16), (700, 4, 7, 128), (99, 4, 11, 16), (300, 3, 6, 32),
])  # fmt: skip
def test_slots_are_sorted(device, M, topk, E, rows, dtype):
    ids = torch.randint(-1, E + 1, (M, topk), dtype=dtype, device=device)
    check(ids, E, rows)


@pytest.mark.parametrize("most", [1, 2])
def test_as_many_tall_tiles_as_can_be(device, most):
    """Every expert has one row too many for other tiles."""
    E, rows = 6, 16
    check(torch.arange(E, device=device).repeat_interleave(most * rows + 1)[:, None], E, rows)


def test_nothing_and_one_expert(device):
    nothing = torch.full((20, 3), -1, dtype=torch.int32, device=device)
    for rows in (8, 16):
        check(nothing, 4, rows)
        check(torch.full_like(nothing, 2), 4, rows)


@pytest.mark.parametrize("M", [6, 400])
def test_experts_of_other_ranks_are_skipped(device, M):
    expert_map = torch.full((16,), -1, dtype=torch.int32, device=device)
    expert_map[[3, 9, 10]] = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    ids = torch.randint(-1, 17, (M, 4), device=device)
    check(ids, 3, 8, expert_map)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("T", "rows"), [(1, 16), (9, 16), (40, 32), (700, 64)])
def test_rows_that_lie_with_their_experts(device, T, rows, dtype):
    """Tiles and rows of scales from counts, also of more rows than there is room for; act_quant."""
    from vllm_ue8m0 import portable
    from vllm_ue8m0.kernels import act_quant, route
    from vllm_ue8m0.kernels.config import MASKED_TILE
    from vllm_ue8m0.layouts import empty_scale

    counts = torch.randint(0, T + 2, (5,), dtype=dtype, device=device)
    counts[2] = 0
    tiles, scale_rows = route.batched_tiles(counts, T, rows)
    wanted, places = [], []
    used = [min(count, T) for count in counts.tolist()]
    for expert, count in enumerate(used):
        first, number = len(wanted), -(-count // rows)
        for i in range(number):
            start, end = expert * T + i * rows, expert * T + min((i + 1) * rows, count)
            places += range(len(wanted) * rows, len(wanted) * rows + end - start)
            wanted.append([expert, start, end, first, number, (first + i) * rows])
    assert tiles.tiles[: int(tiles.num_tiles)].tolist() == wanted
    mask = torch.arange(T)[None] < torch.tensor(used)[:, None]
    assert scale_rows.cpu()[mask].tolist() == places

    x = torch.randn(5, T, 400, dtype=torch.bfloat16, device=device)
    q = torch.empty(5, T, 400, dtype=torch.float8_e4m3fn, device=device)
    s = empty_scale((), len(tiles.tiles) * rows, 4, True, "mn_major", device)
    act_quant.launch(
        x, q, s[None], 128, 105, True, MASKED_TILE, counts.contiguous(), scale_rows=scale_rows
    )
    codes, scales = portable.act_quant(x, 128, True, 105)
    assert same_bits(q.cpu()[mask], codes.cpu()[mask])
    assert same_bits(s.cpu()[torch.tensor(places, dtype=torch.int64)], scales.cpu()[mask])
