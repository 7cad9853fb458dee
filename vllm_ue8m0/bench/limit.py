"""Yardsticks. Of what is limited by bytes: a copy of as many, timed beside every case, and an empty
kernel. Of products: a roof, measured once per run, of reads and of cuBLAS's FP8 product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..kernels import copy as copy_kernel
from ..layouts import ceil_div
from . import BenchError
from .timing import Candidate, Clock, Timing

# Elements are int32; 16 of them at a time let Triton move 16 bytes per thread.
_MULTIPLE = 16
# Large enough that launches and last waves of programs do not matter: 0.3 and 0.7 ms on an H100.
READ_BYTES, PRODUCT = 1 << 30, 8192


@dataclass(frozen=True)
class Roof:
    """What a GPU reaches in reading, TB/s, and in FP8 products, TFLOPS."""

    tb_per_s: float
    tflops: float

    def time_us(self, num_bytes: int, flops: int) -> float:
        """The shortest time of work that moves num_bytes and multiplies and adds flops times."""
        return max(num_bytes / self.tb_per_s, flops / self.tflops) / 1e6


def roof(
    clock: Clock, device: str = "cuda", num_bytes: int = READ_BYTES, size: int = PRODUCT
) -> Roof:
    """Measure the roof: torch's sum over num_bytes, and cuBLAS's product of size^3.

    That product has one scale per tensor and fast accumulation, which no block-scaled product may
    use: nothing on the tensor cores is faster. BenchError if this GPU has no FP8 product.
    """
    values = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    a, w = (
        torch.empty(size, size, dtype=torch.bfloat16, device=device)
        .normal_(std=100)
        .clamp_(-448, 448)
        .to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device=device)
    times = {
        **clock.measure({"a sum": lambda i: values.sum()}, copies=1, calls=4),
        **clock.measure_single({"an FP8 product": lambda i: tensorwise(a, w, one, True)}),
    }
    found = []
    for name, timing in times.items():
        if not isinstance(timing, Timing):
            raise BenchError(f"{name} cannot be timed, so there is no limit: {timing}") from timing
        found.append(timing.time_us)
    read_us, product_us = found
    return Roof(round(num_bytes / read_us / 1e6, 3), round(2 * size**3 / product_us / 1e6, 1))


def tensorwise(a: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, fast: bool) -> torch.Tensor:
    """cuBLAS: a [M, K] e4m3 times w [N, K]^T, one scale for each tensor -> [M, N] bf16."""
    return torch._scaled_mm(
        a, w.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


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
