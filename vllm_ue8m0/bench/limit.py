"""Yardsticks, timed as candidates beside every case: a copy of as many bytes, an empty kernel."""

from __future__ import annotations

from functools import partial

import torch

from ..kernels import copy as copy_kernel
from ..layouts import ceil_div
from .timing import Candidate

# Elements are int32; 16 of them at a time let Triton move 16 bytes per thread.
_MULTIPLE = 16


def copies(num_bytes: int, count: int, device: str) -> dict[str, Candidate]:
    """Ways to read num_bytes / 2 and write as much: the fastest is the limit."""
    elements = ceil_div(ceil_div(num_bytes, 2), 4 * _MULTIPLE) * _MULTIPLE
    src = torch.empty(count, elements, dtype=torch.int32, device=device).random_()
    dst = torch.empty_like(src)

    def by_torch(i: int) -> None:
        dst[i].copy_(src[i])

    def by_triton(config: tuple[int, int], i: int) -> None:
        copy_kernel.launch(src[i], dst[i], config)

    ways: dict[str, Candidate] = {"copy torch": by_torch}
    for config in copy_kernel.CONFIGS:
        ways[f"copy triton {config[0]}x{config[1]}"] = partial(by_triton, config)
    return ways


def empty(device: str) -> Candidate:
    """A kernel that does nothing: what is left of a time when the work is gone."""
    unused = torch.empty(16, dtype=torch.int32, device=device)
    return lambda i: copy_kernel.launch_empty(unused)
