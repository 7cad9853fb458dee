"""MLA's rotary embedding, in place."""

import pytest
import torch
from checks import same_bits

from vllm_ue8m0 import portable, reference


def operands(M, H, D, R, dtype, device):
    """Queries and keys among other columns, positions that repeat, a table."""
    q = torch.randn(M, H + 1, D, dtype=dtype, device=device)[:, :H]
    k = torch.randn(M, R + 9, dtype=dtype, device=device)[:, 3 : R + 3]
    positions = torch.randint(50, (M,), device=device)
    return q, k, positions, torch.randn(50, R, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("M", "H", "D", "R"), [(1, 128, 192, 64), (5, 33, 24, 24), (70, 4, 192, 64), (3, 1, 10, 2)]
)
def test_the_bits_of_plain_torch(device, M, H, D, R, dtype):
    q, k, positions, table = operands(M, H, D, R, dtype, device)
    q[0, 0, -1], k[-1, 0] = float("inf"), float("nan")
    for ids in (positions, positions.int()):
        wanted, found = (q.clone(), k.clone()), (q.clone(), k.clone())
        reference.rotary_embedding(*wanted, ids, table)
        portable.rotary_embedding(*found, ids, table)
        assert all(map(same_bits, found, wanted))
        assert same_bits(found[0][..., : D - R], q[..., : D - R])
        assert not torch.equal(found[0][..., D - R :].nan_to_num(), q[..., D - R :].nan_to_num())


def test_strided_rows(device):
    """What is between them stays."""
    whole = torch.randn(6, 5, 40, device=device).bfloat16()
    keys = torch.randn(6, 32, device=device).bfloat16()
    q, k, before = whole[:, 1:4, 4:36], keys[:, 8:24], (whole.clone(), keys.clone())
    wanted, table = (q.clone(), k.clone()), torch.randn(9, 16, device=device).bfloat16()
    ids = torch.tensor([0, 8, 3, 3, 1, 7], device=device)
    reference.rotary_embedding(*wanted, ids, table)
    portable.rotary_embedding(q, k, ids, table)
    assert same_bits(q, wanted[0]) and same_bits(k, wanted[1])
    q.copy_(before[0][:, 1:4, 4:36])
    k.copy_(before[1][:, 8:24])
    assert same_bits(whole, before[0]) and same_bits(keys, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("M", "H", "R", "L", "S"), [(1, 128, 64, 512, 64), (7, 3, 10, 24, 3), (40, 40, 64, 512, 16)]
)
def test_rows_of_a_cache(device, M, H, R, L, S, dtype):
    """A row for each slot that is none of -1, bit for bit; nothing else of it changes."""
    q, k, positions, table = operands(M, H, R + 5, R, dtype, device)
    latent = torch.randn(M, L + 7, dtype=dtype, device=device)[:, 7:]
    latent[0, 0] = float("nan")
    blocks = -(-M // S) + 3
    whole = torch.randn(blocks, 2, S + 1, L + R, dtype=dtype, device=device)
    slots = torch.randperm(blocks * S, device=device)[: M - M // 5]
    slots[1::3] = -1
    caches = [whole.clone()[:, 1, :S] for _ in range(2)]
    wanted, found = (q.clone(), k.clone()), (q.clone(), k.clone())
    reference.rotary_embedding(*wanted, positions, table, latent, caches[0], slots)
    portable.rotary_embedding(*found, positions, table, latent, caches[1], slots)
    assert all(map(same_bits, found, wanted))
    assert same_bits(caches[1]._base, caches[0]._base)
    for m, slot in enumerate(slots.tolist()):
        row = caches[1][slot // S, slot % S]
        if slot >= 0:
            assert same_bits(row, torch.cat((latent[m], wanted[1][m])))
    changed = (caches[1] != whole[:, 1, :S]).any(-1).flatten()
    assert set(changed.nonzero().flatten().tolist()) <= set(slots.tolist())


def test_a_rotation_of_pairs():
    """(a, b) -> (a cos - b sin, b cos + a sin), neighbours, by the row's position."""
    q, k = torch.tensor([[[9.0, 1, 2, 3, 4]]]), torch.tensor([[1.0, 2, 3, 4]])
    table = torch.tensor([[0.0] * 4, [0.0, 1, 1, 0]])  # a quarter turn of the first pair
    reference.rotary_embedding(q, k, torch.tensor([1]), table)
    assert q.tolist() == [[[9, -2, 1, 3, 4]]] and k.tolist() == [[-2, 1, 3, 4]]


def test_no_rows(device):
    q, k, positions, table = operands(0, 4, 24, 8, torch.bfloat16, device)
    portable.rotary_embedding(q, k, positions, table)
