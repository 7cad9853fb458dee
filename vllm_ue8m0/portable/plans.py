"""What the portable products launch, by the number of rows: equal plans are equal kernels.

For warmup.py, which looks for all that a server may launch. They ask the rules that the operators
of products.py and quant.py ask.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from ..formats import BLOCK
from ..kernels import gemm as gemm_kernel
from ..kernels.config import act_quant_config, one_warp_products, silu_mul_quant_config
from ..layouts import ceil_div

E4M3 = torch.float8_e4m3fn


def linear_plan(
    x: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, gran: Sequence[int], activation_scale: str,
    *, block_scaled: bool = False,
) -> Callable[[int], Hashable]:  # fmt: skip
    """Of `linear`, for rows like those of x."""
    quantized = activation_scale != "none"
    dtype, groups = E4M3 if quantized else x.dtype, ceil_div(w.shape[1], gran[1])
    cores = block_scaled, one_warp_products(x.device)

    def plan(M: int) -> Hashable:
        act = act_quant_config(M, groups, False) if quantized else None
        return _tile(M, dtype, gran, cores), act

    return plan


def experts_plan(
    x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, w2: torch.Tensor, sf2: torch.Tensor,
    gran13: Sequence[int], gran2: Sequence[int], activation_scale: str, topk: int, num_global: int,
    *, block_scaled: bool = False,
) -> Callable[[int], Hashable]:  # fmt: skip
    """Of `experts`."""
    quantized, E = activation_scale != "none", w13.shape[0]
    dtype = E4M3 if quantized else x.dtype
    groups13 = ceil_div(w13.shape[2], gran13[1])
    groups2 = ceil_div(w2.shape[2], gran2[1] if quantized else BLOCK)
    cores = block_scaled, one_warp_products(x.device)

    def plan(M: int) -> Hashable:
        rows = ceil_div(M * topk, E)
        act = act_quant_config(M, groups13, False) if quantized else None
        silu = silu_mul_quant_config(M * topk, groups2)
        tiles = [_tile(rows, dtype, gran, cores) for gran in (gran13, gran2)]
        return *tiles, act, silu

    return plan


def _tile(rows: int, dtype: torch.dtype, gran: Sequence[int], cores: tuple[bool, bool]) -> Hashable:
    config = gemm_kernel.tile_config(rows, dtype, (gran[0], gran[1]), *cores)
    return tuple(config.values())
