"""The yardsticks: a copy copies all of its bytes, and as many as the operator moves."""

import pytest
import torch

from vllm_ue8m0.bench import limit
from vllm_ue8m0.kernels import copy as copy_kernel


@pytest.mark.parametrize("config", copy_kernel.CONFIGS)
@pytest.mark.parametrize("n", [16, 8192, 16400])
def test_triton_copies(config, n: int, device: str):
    src = torch.randint(1 << 30, (n,), dtype=torch.int32, device=device)
    dst = torch.full((n + 16,), -1, dtype=torch.int32, device=device)
    copy_kernel.launch(src, dst[:n], config)
    assert torch.equal(dst[:n], src)
    assert (dst[n:] == -1).all()  # nothing behind the end


@pytest.mark.parametrize("num_bytes", [2, 21_560, 100_001])
def test_candidates_move_what_was_asked_for(
    num_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(copy_kernel, "launch", lambda *arguments: seen.append(arguments))
    ways = limit.copies(num_bytes, 3, device)
    assert list(ways) == ["copy torch"] + [f"copy triton {b}x{w}" for b, w in copy_kernel.CONFIGS]
    for call in ways.values():
        for i in range(3):
            call(i)
    assert [config for _, _, config in seen] == [c for c in copy_kernel.CONFIGS for _ in range(3)]
    for src, dst, _ in seen:
        assert num_bytes <= src.nbytes + dst.nbytes < num_bytes + 130
        assert src.numel() % 16 == 0 and src.data_ptr() % 16 == 0
        assert src.data_ptr() != dst.data_ptr()
        assert torch.equal(src, dst)  # torch's copy ran first
    assert len({src.data_ptr() for src, _, _ in seen}) == 3  # one buffer per index


def test_empty_runs(device: str):
    limit.empty(device)(0)
