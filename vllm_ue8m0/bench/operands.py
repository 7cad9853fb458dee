"""Operands that benchmarks draw, and the bytes of quantized ones."""

from __future__ import annotations

import torch

from ..codec import convert_scale_from_ue8m0
from ..formats import BLOCK, FP8_MAX
from ..layouts import ceil_div

SCALE_BYTES = {"ue8m0": 1, "fp32": 4}


def activations(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal bf16 values, rows of different magnitude: constants or zeros would time too well."""
    device = generator.device
    values = torch.randn(shape, dtype=torch.bfloat16, generator=generator, device=device)
    exponent = torch.randint(-3, 3, (*shape[:-1], 1), generator=generator, device=device)
    return values.mul_(torch.exp2(exponent.to(torch.bfloat16)))


def weight(generator: torch.Generator, N: int, K: int, scale: str) -> tuple[torch.Tensor, ...]:
    """e4m3 codes [N, K] of a normal distribution, scales [ceil(N/128), ceil(K/128)] around 2^-14.

    "ue8m0": bytes, "fp32": float32 that are no powers of two.
    """
    device = generator.device
    values = torch.randn(N, K, dtype=torch.bfloat16, generator=generator, device=device) * 100
    codes = values.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    grid = (ceil_div(N, BLOCK), ceil_div(K, BLOCK))
    sf = torch.randint(111, 116, grid, generator=generator, device=device).to(torch.uint8)
    if scale == "ue8m0":
        return codes, sf
    factors = 1 + torch.rand(grid, generator=generator, device=device)
    return codes, convert_scale_from_ue8m0(sf) * factors


def expert_weights(
    generator: torch.Generator, experts: int, N: int, K: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` of every expert: codes [experts, N, K] and UE8M0 scales, drawn one by one."""
    device, grid = generator.device, (ceil_div(N, BLOCK), ceil_div(K, BLOCK))
    codes = torch.empty(experts, N, K, dtype=torch.float8_e4m3fn, device=device)
    sf = torch.empty(experts, *grid, dtype=torch.uint8, device=device)
    for codes_of_one, sf_of_one in zip(codes, sf, strict=True):
        drawn, scales = weight(generator, N, K, "ue8m0")
        codes_of_one.copy_(drawn)
        sf_of_one.copy_(scales)
    return codes, sf


def quantized_bytes(M: int, K: int, scale: str, layout: str = "row_major") -> int:
    """Codes [M, K] and their scales; padding of column-major scales is not written."""
    groups = ceil_div(K, BLOCK)
    if layout == "mn_major_packed":
        return M * (K + ceil_div(groups, 4) * 4)
    return M * (K + groups * SCALE_BYTES[scale])


def block_scale_bytes(N: int, K: int, scale: str) -> int:
    """Scales of the 128x128 blocks of a weight."""
    return ceil_div(N, BLOCK) * ceil_div(K, BLOCK) * SCALE_BYTES[scale]
