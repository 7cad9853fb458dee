"""Launch parameters of the quantization kernels: rules with the measurements behind them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

# For every kernel that multiplies and adds floats: one FMA, as it was tested and measured, whatever
# TRITON_DEFAULT_FP_FUSION says. Without it Triton 3.9 warns that 3.10 will not fuse by default.
FMA = {"enable_fp_fusion": True}
# For one whose products are rounded before they are added.
NO_FMA = {"enable_fp_fusion": False}

# Compute capabilities, sm_9x and sm_10x, whose instructions multiply for four warps together.
FOUR_WARP_MAJORS = (9, 10)

# Programs of a masked launch, which share the used tiles whatever the counts: 8 on each of an
# H100's SMs. 2026-11-22, silu_mul_quant of [32, 1024, 4096], us with 1056, 4224 and 16896 programs:
# 17,076 rows 60.5, 60.5, 66.1; 4 rows for each expert 3.0, 6.1, 20.8; all on one 5.8, 6.2, 20.8.
MASKED_PROGRAMS = 1024


@dataclass(frozen=True)
class TileConfig:
    """A program's tile, rows x groups, and its warps; see tile.py."""

    rows: int
    groups: int
    num_warps: int

    def grid(self, E: int, M: int, groups: int, masked: bool) -> tuple[int, int]:
        """One program a tile; masked: a number that does not depend on the counts."""
        columns, tiles = triton.cdiv(groups, self.groups), triton.cdiv(M, self.rows)
        return (masked_programs(columns, E * tiles), 1) if masked else (columns * tiles, E)


def masked_programs(columns: int, tiles: int) -> int:
    """Programs that share the used ones of `tiles` tiles in each of `columns` columns."""
    return columns * min(tiles, triton.cdiv(MASKED_PROGRAMS, columns))


# 17,076 rows as above: 4 x 4 64.4 us, 8 x 4 60.5, 16 x 4 63.2.
MASKED_TILE = TileConfig(8, 4, 4)


def act_quant_config(M: int, groups: int, mn_major: bool) -> TileConfig:
    """By measurement; H100, 2026-11-22, K = 7168, UE8M0, back to back in a graph, us:

    rows x groups, warps    M = 1    16    64   128   1024   8192
    1 x 4, 1                 1.48  1.52  1.91  2.52
    2 x 4, 1                 1.59  1.61  1.93  2.42   9.33  70.0
    8 x 4, 4                                   2.81   9.10  59.5   float32 scales: 60.0
    16 x 4, 8                                         9.18  59.3   float32 scales: 62.8

    One warp with 16 values a thread wins while there are few programs; many programs that small
    are limited by how fast they start. Column-major scales: 16 bytes of a column a program.
    """
    if M * groups <= 64 * 56:
        return TileConfig(1, 4, 1)
    if M * groups <= 256 * 56:
        return TileConfig(2, 4, 1)
    return TileConfig(16, 4, 8) if mn_major else TileConfig(8, 4, 4)


def silu_mul_quant_config(M: int, groups: int) -> TileConfig:
    """H100, 2026-11-22, us: 8192 x 2048 29.2 at 4 x 4 and 4 warps, 30.7 at 16 x 4 and 8."""
    return TileConfig(1, 4, 1) if M * groups <= 64 * 56 else TileConfig(4, 4, 4)


def starts_product(M: int, groups: int) -> bool:
    """Whether silu_mul_quant lets the product behind it start before its own inputs are there.

    That takes 2.7 us off a dense layer's MLP. Shared experts', known by their width, then stand
    before the kernels that sort tokens (tile.py): 64 tokens' routed experts began 25 us after the
    norm before them, 18 otherwise, 16 tokens' 20 and 17.5. For one token, 14 and 11.5, what is read
    beside the experts then costs as much. Traces and steps, H200, 2026-11-30.
    """
    return M <= 8 or groups > 16


def rms_norm_quant_warps(K: int) -> int:
    """By K alone: the order of the sum over a row, and so its last bit, must not depend on M.

    H100, 2026-11-22, us at M = 16 and 8192:
    K = 1536    2 warps 2.02, 31.8     4 warps 1.90, 31.5      8 warps 1.77, 31.2
    K = 7168    4 warps 3.02, 138.6    8 warps 2.85, 138.6    16 warps 2.97, 142.8
    """
    return 16 if K > 8192 else min(max(triton.next_power_of_2(K) // 256, 2), 8)


def weight_quant_warps(ue8m0: bool) -> int:
    """H100, 2026-11-22, 36864 x 7168, share of a copy's speed at 4, 8 and 16 warps:

    UE8M0 1.01, 1.01, 1.02; float32 scales 0.98, 0.71, 0.70, for want of registers.
    """
    return 8 if ue8m0 else 4


def kernel_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes of a product as its kernel reads them: bytes before sm_89, where Triton has no e4m3."""
    if codes.dtype == torch.float8_e4m3fn and codes.is_cuda and not _has_e4m3(codes.device.index):
        return codes.view(torch.uint8)
    return codes


@cache
def _has_e4m3(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 9)


def one_warp_products(device: torch.device) -> bool:
    """Whether each warp multiplies alone there (mma.sync)."""
    return device.type == "cuda" and _major(device.index) not in FOUR_WARP_MAJORS


@cache
def _major(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def batch_invariant() -> bool:
    """Whether a row's result shall not depend on the batch at all: vLLM's VLLM_BATCH_INVARIANT.

    Products then sum K in one order, on the same instructions, for any number of rows.
    """
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


@cache
def _supports_dependent_launch(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch, where the device has it (sm_90)."""
    pdl = device.type == "cuda" and _supports_dependent_launch(device.index)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
