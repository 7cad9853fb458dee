"""What bounds a product: reading memory, or cuBLAS's FP8 product, measured once per run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import BenchError
from .timing import Clock, Timing

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


def measure(
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
