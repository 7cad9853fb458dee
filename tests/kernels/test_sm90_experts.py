"""Routed experts on sm_90: the same bits as their steps one by one, in every kernel."""

import importlib
from dataclasses import replace

import pytest
import torch
from checks import random_codes, random_scale, same_bits

from vllm_ue8m0 import portable

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of sm_90",
)

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)


@pytest.fixture
def sm90():
    from vllm_ue8m0 import sm90

    return sm90


def weights(E, H, I, dtype=U8, with_c=False):  # noqa: E741
    w13, w2 = (random_codes(E, *s, device="cuda") for s in ((2 * I, H), (H, I)))
    blocks = -(-H // 128)
    sf13 = random_scale(E, 2 * I // 128, blocks, dtype=dtype, device="cuda")
    sf2 = random_scale(E, blocks, I // 128, dtype=dtype, device="cuda")
    if dtype == U8:  # keeps the results within float16
        sf13, sf2 = sf13 - 9, sf2 - 9
    else:
        sf13, sf2 = sf13 * 2.0**-9, sf2 * 2.0**-9
    c13 = c2 = None
    if with_c:
        c13, c2 = (torch.rand(*sf.shape[:2], device="cuda") + 1 for sf in (sf13, sf2))
    return w13, sf13, c13, w2, sf2, c2


def routing(M, topk, E, first=-1, last=None):
    ids = torch.randint(first, last or E + 1, (M, topk), device="cuda", dtype=torch.int32)
    return torch.rand(M, topk, device="cuda"), ids


def run(experts, x, w, route, kind="ue8m0", expert_map=None):
    return experts(x, *w, *route, GRAN, GRAN, kind, False, expert_map)


def step_by_step(sm90, x, w, route, kind="ue8m0"):
    """Every expert's rows by the dense products; a product is weighted, then rounded."""
    w13, sf13, c13, w2, sf2, c2 = w
    topk_weights, topk_ids = route
    M, topk = topk_ids.shape
    products = torch.zeros(M, topk, x.shape[1], dtype=x.dtype, device=x.device)
    ue8m0 = kind == "ue8m0"
    for e in range(len(w13)):
        token, k = (topk_ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        a, a_s = portable.act_quant(x[token], 128, ue8m0)
        c = None if c13 is None else c13[e]
        gate_up = sm90.gemm(a, a_s, w13[e], sf13[e], c, None, GRAN, x.dtype)
        hidden, hidden_s = portable.silu_mul_quant(gate_up, 128, ue8m0)
        c = None if c2 is None else c2[e]
        out = sm90.gemm(hidden, hidden_s, w2[e], sf2[e], c, None, GRAN, F32)
        products[token, k] = (out * topk_weights[token, k, None]).to(x.dtype)
    total = torch.zeros(x.shape, device=x.device)
    for k in range(topk):
        total += products[:, k].float()
    return total.to(x.dtype)


# Rows of an expert reach every tile height, and more than one tile.
@pytest.mark.parametrize(("M", "topk", "E"), [
    (1, 8, 32), (1, 2, 3), (2, 8, 64), (9, 4, 16), (40, 8, 64), (60, 8, 16), (200, 4, 32),
    (150, 8, 24), (300, 8, 8), (517, 2, 5), (700, 8, 9),
])  # fmt: skip
@pytest.mark.parametrize(("H", "I"), [(1024, 256), (400, 128), (7168, 128)])
def test_same_bits_as_step_by_step(sm90, monkeypatch, M, topk, E, H, I):  # noqa: E741
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    x, w, route = (
        torch.randn(M, H, device="cuda", dtype=BF16),
        weights(E, H, I),
        routing(M, topk, E),
    )
    assert sm90.experts_refusal(x, w[0], w[1], w[3], w[4], GRAN, GRAN, "ue8m0") is None
    expected = step_by_step(sm90, x, w, route)
    for _ in range(2):  # the second finds the counters that the first left
        assert same_bits(run(sm90.experts, x, w, route), expected)


def use_chain(monkeypatch, stages):
    module = importlib.import_module("vllm_ue8m0.sm90.experts")
    rule = module.experts_config

    def chained(*sizes):
        return replace(rule(*sizes), chain=stages, one_token=False)

    monkeypatch.setattr(module, "experts_config", chained)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(("E", "H", "I"), [(32, 7168, 256), (8, 1024, 2048), (6, 400, 128)])
def test_rings_of_a_chain(sm90, monkeypatch, stages, E, H, I):  # noqa: E741
    """Units of the second product, fewer or more of them than a ring has stages for."""
    use_chain(monkeypatch, stages)
    w = weights(E, H, I)
    for M in (1, 2, 9, 16):
        x, route = torch.randn(M, H, device="cuda", dtype=BF16), routing(M, 4, E)
        expected = step_by_step(sm90, x, w, route)
        for _ in range(10):
            assert same_bits(run(sm90.experts, x, w, route), expected)


@pytest.mark.parametrize(("topk", "H", "I"), [(8, 1024, 2048), (8, 128, 128), (4, 7168, 256)])
def test_one_token_in_a_chain(sm90, monkeypatch, topk, H, I):  # noqa: E741
    """Ids that change just before, other ranks' and the same expert twice among them."""
    use_chain(monkeypatch, 4)
    E, num_global = 12, 16
    w, x = weights(E, H, I), torch.randn(1, H, device="cuda", dtype=BF16)
    scale, given = routing(1, topk, num_global, 0, num_global)
    expert_map = torch.cat((torch.arange(E), torch.full((num_global - E,), -1)))
    expert_map = expert_map[torch.randperm(num_global)].int().cuda()
    ids = torch.empty_like(given)

    def once():
        ids.copy_(given)
        return run(sm90.experts, x, w, (scale, ids), expert_map=expert_map)

    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = once()
    for i in range(200):
        given.copy_(routing(1, topk, num_global, 0, 3 if i % 5 == 0 else num_global)[1])
        expected = step_by_step(sm90, x, w, (scale, expert_map[given.long()]))
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, expected)


@pytest.mark.parametrize("M", [1, 7, 300])
@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
@pytest.mark.parametrize("x_dtype", [BF16, torch.float16])
def test_kinds_of_scales_and_factors(sm90, monkeypatch, M, kind, x_dtype):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    w = weights(8, 640, 256, F32 if kind == "fp32" else U8, with_c=True)
    x, route = torch.randn(M, 640, device="cuda", dtype=x_dtype), routing(M, 4, 8)
    expected = step_by_step(sm90, x, w, route, kind)
    assert same_bits(run(sm90.experts, x, w, route, kind), expected)


@pytest.mark.parametrize("M", [1, 2, 30, 64])
def test_divided_products(sm90, monkeypatch, M):
    """K of the gated product in parts: near the whole sum, and the same bits every time."""
    w, route = weights(8, 7168, 256), routing(M, 2, 8)
    x = torch.randn(M, 7168, device="cuda", dtype=BF16)
    outs = [run(sm90.experts, x, w, route) for _ in range(5)]
    assert all(same_bits(outs[0], out) for out in outs[1:])
    expected = step_by_step(sm90, x, w, route).float()
    assert (outs[0].float() - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("M", [1, 5, 200])
def test_routing_edges(sm90, monkeypatch, M):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    w, x = weights(6, 512, 128), torch.randn(M, 512, device="cuda", dtype=BF16)
    scale = torch.rand(M, 3, device="cuda")
    for ids in (
        torch.full((M, 3), -1),  # nothing
        torch.full((M, 3), 4),  # everything on one expert, three times a token
        torch.tensor([[0, -1, 6]]).expand(M, 3),  # mostly elsewhere
        torch.tensor([[5, 5, 0]]).expand(M, 3),
    ):
        for dtype in (torch.int32, torch.int64):
            route = scale, ids.to("cuda", dtype)
            expected = step_by_step(sm90, x, w, route)
            assert same_bits(run(sm90.experts, x, w, route), expected)


@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize(("M", "most"), [(24, 1), (60, 1), (60, 2), (150, 2)])
def test_popular_experts_have_tall_tiles(sm90, monkeypatch, M, most, least):
    """Beside others with a tile or two, and many without any row; not if there are too few."""
    module = importlib.import_module("vllm_ue8m0.sm90.experts")
    rule, rows = module.experts_config, []

    def config(*sizes):
        found = replace(rule(*sizes), tall=most, least_tall=least)
        rows.append(found.rows)
        return found

    monkeypatch.setattr(module, "experts_config", config)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    E, topk, H, I = 64, 4, 1024, 256  # noqa: E741
    w, x = weights(E, H, I), torch.randn(M, H, device="cuda", dtype=BF16)
    scale, ids = routing(M, topk, E)
    ids[:, 0] = 3
    ids[:, 1] = torch.where(torch.rand(M, device="cuda") < 0.7, 60, 5)
    expected = step_by_step(sm90, x, w, (scale, ids))
    for _ in range(2):
        assert same_bits(run(sm90.experts, x, w, (scale, ids)), expected)
    assert {most * used < M for used in rows} == {True}


@pytest.mark.parametrize("M", [33, 150, 400])
def test_a_row_does_not_depend_on_the_batch(sm90, monkeypatch, M):
    """Also where other rows are NaN, and in every regime when batch-invariant."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    w, (scale, ids) = weights(16, 1024, 256), routing(M, 4, 16)
    x = torch.randn(M, 1024, device="cuda", dtype=BF16)
    whole = run(sm90.experts, x, w, (scale, ids))
    for rows in ([0], [3, 1], list(range(M // 2))):
        part = run(sm90.experts, x[rows], w, (scale[rows], ids[rows]))
        assert same_bits(part, whole[rows])
    spoiled = x.clone()
    spoiled[1::2] = torch.nan
    assert same_bits(run(sm90.experts, spoiled, w, (scale, ids))[::2], whole[::2])


@pytest.mark.parametrize("M", [1, 2, 16, 40, 300, 1500])
@pytest.mark.parametrize("ranks", [2, 8])
def test_expert_parallel_ranks(sm90, monkeypatch, M, ranks):
    """expert_map skips what other ranks have, and the ranks' results add up to the single one's.

    Bit for bit where one rank has all of a token's experts. Otherwise the ranks' sums are rounded,
    and the single rank's is: by half a unit of bfloat16 at most, 2^-9 of a norm. Independent parts
    have the norm of their sum together.
    """
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    E, topk, H, I = 32, 4, 1024, 256  # noqa: E741
    w, x = weights(E, H, I), torch.randn(M, H, device="cuda", dtype=BF16)
    scale, ids = routing(M, topk, E, 0, E)
    local = E // ranks
    ids[1::2] = ids[1::2] % local + ids[1::2, :1] // local * local  # all on one rank
    single, parts = run(sm90.experts, x, w, (scale, ids)), []
    for rank in range(ranks):
        here = slice(rank * local, (rank + 1) * local)
        expert_map = torch.full((E,), -1, dtype=torch.int32, device="cuda")
        expert_map[here] = torch.arange(local, dtype=torch.int32, device="cuda")
        own = [None if part is None else part[here] for part in w]
        parts.append(run(sm90.experts, x, own, (scale, ids), expert_map=expert_map))
        mapped = expert_map[ids.long()]
        assert same_bits(parts[-1], run(sm90.experts, x, own, (scale, mapped)))
        assert not parts[-1][(mapped < 0).all(1)].any()
    assert same_bits(torch.stack(parts).sum(0)[1::2], single[1::2])
    total = torch.stack(parts).float().sum(0)
    assert (total - single.float()).norm() <= 2**-8 * single.float().norm()


def tensor_parallel(w, rank, ranks):
    """A rank's part of every expert: rows of its gate and of its up, columns of its down."""
    w13, sf13, _, w2, sf2, _ = w
    rows = [t.unflatten(1, (2, ranks, -1))[:, :, rank].flatten(1, 2) for t in (w13, sf13)]
    columns = [t.unflatten(2, (ranks, -1))[:, :, rank].contiguous() for t in (w2, sf2)]
    return *rows, None, *columns, None


@pytest.mark.parametrize("M", [1, 16, 300])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks(sm90, monkeypatch, M, ranks):
    """The parts add up; every product of a slot is rounded besides, and by chance half as much."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    E, topk, H, I = 8, 4, 1024, 512  # noqa: E741
    w, x = weights(E, H, I), torch.randn(M, H, device="cuda", dtype=BF16)
    route = routing(M, topk, E, 0, E)
    single = run(sm90.experts, x, w, route).float()
    total = torch.zeros_like(single)
    for rank in range(ranks):
        total += run(sm90.experts, x, tensor_parallel(w, rank, ranks), route).float()
    assert (total - single).norm() <= 2**-8 * single.norm()


@pytest.mark.parametrize("M", [1, 16, 300])
def test_graphs_replay(sm90, M):
    w, x = weights(8, 1024, 256), torch.randn(M, 1024, device="cuda", dtype=BF16)
    scale, ids = routing(M, 4, 8)
    run(sm90.experts, x, w, (scale, ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(sm90.experts, x, w, (scale, ids))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        ids.copy_(routing(M, 4, 8)[1])
        expected = run(sm90.experts, x, w, (scale, ids))
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, expected)


# Rows that an expert has room for, and uses.
@pytest.mark.parametrize(("T", "counts"), [
    (1, (1, 0, 1)), (9, (9, 3, 0, 1)), (30, (0, 0, 30)), (70, (66, 0, 70, 3)), (300, (300, 7, 129)),
    (4, (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
@pytest.mark.parametrize(("H", "I"), [(1024, 256), (400, 128)])
def test_batched_rows_are_those_of_step_by_step(sm90, monkeypatch, T, counts, kind, H, I):  # noqa: E741
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    E = len(counts)
    w = weights(E, H, I, F32 if kind == "fp32" else U8, with_c=kind == "fp32")
    x = torch.randn(E, T, H, device="cuda", dtype=BF16)
    out = torch.full_like(x, torch.nan)
    for dtype in (torch.int32, torch.int64):
        used = torch.tensor(counts, dtype=dtype, device="cuda")
        for e, count in enumerate(counts):
            x[e, count:] = torch.nan
        got = sm90.batched_experts(x, *w, used, GRAN, GRAN, kind, out=out)
        assert got is out
        for e, count in enumerate(counts):
            ids = torch.full((count, 1), e, device="cuda", dtype=torch.int32)
            ones = torch.ones(count, 1, device="cuda")
            expected = step_by_step(sm90, x[e, :count], w, (ones, ids), kind)
            assert same_bits(got[e, :count], expected)
            assert got[e, count:].isnan().all()


@pytest.mark.parametrize("inner", [2048, 256])
@pytest.mark.parametrize("M", [1, 2, 16, 33, 300, 2048])
def test_memory(sm90, M, inner):
    """At most what vLLM's Triton experts ask for (TritonExperts.workspace_shapes, 0.26)."""
    E, H, topk = 16, 7168, 8
    x, w, route = (
        torch.randn(M, H, device="cuda", dtype=BF16),
        weights(E, H, inner),
        routing(M, topk, E, 0, E),
    )
    out = torch.empty_like(x)
    args = (x, *w, *route, GRAN, GRAN, "ue8m0", False, None, out)
    sm90.experts(*args)  # counters stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sm90.experts(*args)
    used = torch.cuda.max_memory_allocated() - before
    theirs = 2 * M * topk * (max(inner, H) + max(2 * inner, H))
    parts = 2**18 if M == 1 else 0  # one token's sums by parts of K
    assert used <= theirs + parts + 2**16  # each of our tensors takes whole blocks of 512 bytes
