"""Draws of routings: distinct experts, the stated popularity, and what a rank has of them."""

import pytest
import torch

from vllm_ue8m0.bench import routing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(kind, tokens, seed=0):
    return routing.draw(generator(seed), kind, tokens, 256, 8)


@pytest.mark.parametrize("kind", routing.KINDS)
def test_a_token_has_different_experts(kind: str):
    ids = draw(kind, 100)
    assert ids.dtype == torch.int32 and ids.shape == (100, 8) and ids.is_contiguous()
    assert int(ids.min()) >= 0 and int(ids.max()) < 256
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert torch.equal(ids, draw(kind, 100)) and not torch.equal(ids, draw(kind, 100, seed=1))


def test_popularity():
    tokens = 20_000
    share = {
        kind: torch.bincount(draw(kind, tokens).flatten(), minlength=256) / tokens
        for kind in routing.KINDS
    }
    assert share["uniform"].sub(8 / 256).abs().max() < 0.005
    skewed = share["skewed"][[0, 127, 255]]
    assert skewed.sub(torch.tensor([0.79, 0.012, 0.006])).abs().lt(0.01).all()
    assert bool((share["skewed"][:8].diff() < 0).all())
    assert sorted(share["single"].unique().tolist()) == [0, 1]


def test_weights_of_a_token_sum_to_one():
    weights = routing.weights(generator(), 10, 8)
    assert weights.dtype == torch.float32 and weights.shape == (10, 8)
    assert bool((weights > 0).all())
    assert torch.allclose(weights.sum(-1), torch.ones(10))


def test_ids_of_a_rank():
    ids = torch.tensor([[3, 0], [7, 4]], dtype=torch.int32)
    local = routing.local_ids(ids, 4)
    assert local.tolist() == [[3, 0], [-1, -1]] and local.dtype == torch.int32
    assert torch.equal(routing.local_ids(ids, 8), ids)
    expert_map = routing.expert_map(8, 4, torch.device("cpu"))
    assert expert_map.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert torch.equal(expert_map[ids.long()], local)
    assert expert_map.dtype == torch.int32  # vLLM's


def test_active_experts():
    assert routing.active(torch.tensor([[3, 0], [-1, 3]])) == (3, 2)
    assert routing.active(torch.full((2, 2), -1)) == (0, 0)
