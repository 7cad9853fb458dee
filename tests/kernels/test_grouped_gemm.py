"""Routing, the grouped products and the sum over slots, each against float64 or integers."""

import golden
import numpy as np
import pytest
import torch
from checks import BLOCK_SCALING, assert_product, random_codes, random_scale, same_bits

from vllm_ue8m0 import portable
from vllm_ue8m0.kernels import gemm, grouped_gemm

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)
E = 5
BY_TENSOR_CORES = pytest.param(True, marks=BLOCK_SCALING, id="block_scaled")
SCALED = pytest.mark.parametrize("scaled", [pytest.param(False, id="promoted"), BY_TENSOR_CORES])


def routings(M: int, topk: int) -> dict[str, torch.Tensor]:
    spread = torch.rand(M, E).argsort(1)[:, :topk]
    mixed = spread.clone()
    mixed[torch.rand(M, topk) < 0.3] = -1
    return {
        "spread": spread,
        "one_expert": torch.full((M, topk), 3),
        "some_skipped": mixed,
        "all_skipped": torch.full((M, topk), -1),
        "not_local": torch.where(torch.rand(M, topk) < 0.5, spread, E + 2),
        "empty_experts": torch.where(spread == 0, 4, torch.where(spread == 2, 1, spread)),
    }


KINDS = list(routings(1, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("M", "topk", "block_m"), [(1, 1, 16), (3, 2, 16), (33, 4, 16), (65, 4, 64)]
)
def test_route_covers_every_slot_once(device, M, topk, block_m, kind, dtype):
    ids = routings(M, topk)[kind].to(dtype).to(device)
    order, tiles = portable.products._route(ids, E, block_m)
    tile_expert, tile_start, ends = (t.tolist() for t in tiles)
    order, flat, seen = order.tolist(), ids.flatten().tolist(), []
    for expert, start in zip(tile_expert, tile_start, strict=True):
        if expert == E:
            continue
        rows = range(start, min(start + block_m, ends[expert]))
        assert len(rows) > 0
        assert all(flat[order[row]] == expert for row in rows)
        seen += [order[row] for row in rows]
    assert sorted(seen) == [slot for slot, expert in enumerate(flat) if 0 <= expert < E]
    # Stable: the slots of an expert stay in order, so a row's result has one place.
    assert seen == sorted(seen, key=lambda slot: (flat[slot], slot))


def operands(rows, N, K, device, a_dtype=U8, w_dtype=U8, gran=GRAN):
    grid = -(-N // gran[0]), -(-K // gran[1])
    a = random_codes(rows, K, device=device)
    w = random_codes(E, N, K, device=device)
    a_s = random_scale(rows, grid[1], dtype=a_dtype, device=device)
    return a, a_s, w, random_scale(E, *grid, dtype=w_dtype, device=device)


def run(a, a_s, w, sf, c, gran, ids, weights, gather, out_dtype, scaled):
    slots, topk = ids.numel(), ids.shape[1]
    config = gemm.tile_config(-(-slots // E), a.dtype, gran, scaled)
    order, tiles = portable.products._route(ids, E, config["BLOCK_M"])
    out = torch.empty(slots, w.shape[1], dtype=out_dtype, device=a.device)
    grouped_gemm.launch(a, a_s, w, sf, c, gran, order, weights, tiles, topk, gather, config, out)
    return out, order


def check(a, a_s, w, sf, c, gran, ids, weights, gather, out_dtype=BF16, scaled=False):
    out, order = run(a, a_s, w, sf, c, gran, ids, weights, gather, out_dtype, scaled)
    a64 = a.double().cpu().numpy() if a_s is None else golden.dequantize(a, a_s, (1, gran[1]))
    flat, order, written = ids.flatten().tolist(), order.tolist(), []
    for e in range(E):
        rows = [row for row, slot in enumerate(order) if flat[slot] == e]
        if not rows:
            continue
        slots = [order[row] for row in rows]
        source = [slot // ids.shape[1] for slot in slots] if gather else rows
        target = rows if gather else slots
        scale = np.ones((len(rows), w.shape[1]))
        if c is not None:
            scale = scale * np.repeat(c[e].double().cpu().numpy(), gran[0])[: w.shape[1]]
        if weights is not None:
            scale = scale * weights[slots].double().cpu().numpy()[:, None]
        w64 = golden.dequantize(w[e], sf[e], gran)
        assert_product(out[target], a64[source], w64, (scale, 0.0))
        written += target
    skipped = [row for row in range(ids.numel()) if row not in written]
    assert out[skipped].isnan().all()  # as poisoned


@SCALED
@pytest.mark.parametrize("gather", [True, False], ids=["gate_up", "down"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "topk"), [(1, 1), (17, 3)])
def test_routings(device, M, topk, kind, gather, scaled):
    ids = routings(M, topk)[kind].to(device)
    weights = None if gather else torch.rand(M * topk, device=device)
    rows = M if gather else M * topk
    check(*operands(rows, 70, 192, device), None, GRAN, ids, weights, gather, scaled=scaled)


@pytest.mark.parametrize("gather", [True, False], ids=["gate_up", "down"])
@pytest.mark.parametrize(
    ("a_dtype", "w_dtype", "scaled"),
    [
        (U8, F32, False),
        (F32, U8, False),
        (F32, F32, False),
        pytest.param(U8, U8, True, marks=BLOCK_SCALING),
    ],
)
@pytest.mark.parametrize("gran", [GRAN, (16, 64)])
def test_scales_and_row_factors(device, gran, a_dtype, w_dtype, scaled, gather):
    ids = routings(9, 2)["some_skipped"].to(device)
    rows = 9 if gather else 18
    c = torch.rand(E, -(-100 // gran[0]), device=device) + 1
    args = operands(rows, 100, 160, device, a_dtype, w_dtype, gran)
    weights = torch.rand(18, device=device).to(BF16)
    check(*args, c, gran, ids.to(torch.int32), weights, gather, F32, scaled)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_activations_not_quantized(device, dtype):
    ids = routings(9, 2)["spread"].to(device)
    _, _, w, sf = operands(1, 70, 192, device)
    a = torch.randn(9, 192, device=device).to(dtype)
    check(a, None, w, sf, None, GRAN, ids, None, True, F32)


@SCALED
@pytest.mark.parametrize(("M", "topk"), [(40, 3), (100, 3), (200, 3), (900, 3)])
def test_tall_tiles(device, M, topk, scaled):
    """Every tile height above 16, with more rows than one tile for one expert."""
    ids = routings(M, topk)["spread"].to(device)
    ids[: M // 2] = 1
    check(*operands(M, 40, 128, device), None, GRAN, ids, None, True, scaled=scaled)


def test_combine_sums_in_slot_order(device):
    M, topk, N = 9, 5, 600
    slots = torch.randn(M * topk, N, device=device) * torch.logspace(-3, 3, N, device=device)
    slots = slots.to(BF16)
    ids = routings(M, topk)["some_skipped"].to(device)
    ids[3], ids[5, 1:3] = -1, torch.tensor([E, E + 7], device=device)
    skipped = ((ids < 0) | (ids >= E)).flatten()
    slots[skipped] = torch.nan  # never read
    out = torch.empty(M, N, dtype=BF16, device=device)
    grouped_gemm.combine(slots, ids, E, out)
    wanted = torch.zeros(M, N, device=device)
    for k in range(topk):
        wanted += slots.view(M, topk, N)[:, k].float().nan_to_num(0.0)
    assert same_bits(out, wanted.to(BF16))
    assert (out[3] == 0).all()
