"""Operands that benchmarks draw, and the bytes of quantized ones."""

from __future__ import annotations

import torch

from ..formats import BLOCK
from ..layouts import ceil_div

SCALE_BYTES = {"ue8m0": 1, "fp32": 4}


def activations(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal bf16 values, rows of different magnitude: constants or zeros would time too well."""
    device = generator.device
    values = torch.randn(shape, dtype=torch.bfloat16, generator=generator, device=device)
    exponent = torch.randint(-3, 3, (*shape[:-1], 1), generator=generator, device=device)
    return values.mul_(torch.exp2(exponent.to(torch.bfloat16)))


def quantized_bytes(M: int, K: int, scale: str, layout: str = "row_major") -> int:
    """Codes [M, K] and their scales; padding of column-major scales is not written."""
    groups = ceil_div(K, BLOCK)
    if layout == "mn_major_packed":
        return M * (K + ceil_div(groups, 4) * 4)
    return M * (K + groups * SCALE_BYTES[scale])


def block_scale_bytes(N: int, K: int, scale: str) -> int:
    """Scales of the 128x128 blocks of a weight."""
    return ceil_div(N, BLOCK) * ceil_div(K, BLOCK) * SCALE_BYTES[scale]
