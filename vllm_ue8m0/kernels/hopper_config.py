"""Launch configurations of the sm_90 products: tables that `vllm-ue8m0 tune` made, else rules.

A table is a JSON file for one GPU in `tuned/`, by (N, K) and the nearest number of rows. There are
three regimes of rows: up to 64, up to 256, more. In each, SPLITS depends on (N, K) alone, so that
a row's result does not depend on the batch within it; above 256 rows and in batch-invariant runs
it is 1: then every kernel sums K in the same order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..formats import BLOCK
from ..layouts import ceil_div

MAX_DECODE_ROWS, MAX_MIDDLE_ROWS = 64, 256
PREFILL_ROWS = 128  # of the smallest tile above MAX_DECODE_ROWS
MAX_K = 65536  # of 64 tokens' scales beside one stage, where K is not divided
TABLES = Path(__file__).parents[1] / "tuned"
# Shared memory of a program: alone on an SM, and with a second one, so that the next kernel's
# weights are on their way while this one ends.
SHARED_BYTES, HALF_SHARED_BYTES = 227 * 1024, 113 * 1024
MAX_STAGES = 7  # of decode_gemm: more have not been faster


@dataclass(frozen=True)
class DecodeConfig:
    """decode_gemm: tokens a tile, rows of w a tile (64, 128), ring stages of two blocks of K."""

    tokens: int
    block_n: int
    stages: int
    splits: int
    programs: int
    fused: bool = False
    warps: int = 4  # a multiple of block_n / 16

    def __post_init__(self) -> None:
        _check(self, self.block_n in (64, 128), "block_n is 64 or 128")
        groups, rest = divmod(self.warps, self.block_n // 16)
        # A warpgroup multiplies 64 rows by at least 8 tokens.
        usable = rest == 0 and groups in (1, 2) and 8 * groups <= self.tokens
        _check(self, usable, "warps are once or twice block_n / 16, for 8 tokens each")
        _check(self, self.programs % self.splits == 0, "programs are a multiple of splits")

    def blocks(self, NK: int) -> int:
        """A power of two, at least the blocks of K of any part."""
        return 1 << (2 * ceil_div(ceil_div(NK, 2), self.splits) - 1).bit_length()


@dataclass(frozen=True)
class PrefillConfig:
    """prefill_gemm: rows of a and of w a tile, ring stages, parts of K."""

    block_m: int
    block_n: int
    stages: int
    splits: int = 1

    def __post_init__(self) -> None:
        _check(self, self.block_m in (128, 256), "block_m is 128 or 256")
        if self.block_m == 128:
            _check(self, self.stages % 2 == 0, "tiles of 128 rows take stages in pairs")
        else:
            _check(self, self.splits == 1, "tiles of 256 rows are not split")


def _check(config: Any, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{config}: {rule}. Remove its table in `tuned/` or tune again.")


def tokens(M: int) -> int:
    """Tokens of a tile for M <= 64 rows: the tensor cores take 8 and more."""
    return max(8, 1 << (M - 1).bit_length())


def decode_stages(config: DecodeConfig, NK: int, budget: int) -> int:
    """Stages that fit into `budget` bytes of shared memory beside the rest."""
    rest = config.blocks(NK) * 4 * (config.tokens + 2)
    rest += config.block_n * config.tokens * 4 + 4096  # of layout conversions and barriers
    if config.fused:
        rest += config.blocks(NK) * config.tokens * 128
    stage = 2 * 128 * (config.block_n + (0 if config.fused else config.tokens))
    return (budget - rest) // stage


def default_splits(N: int, K: int, sms: int) -> int:
    """Parts of K of decode_gemm: enough programs to draw the full bandwidth.

    About half the SMs do already, and adding parts costs 1 to 3 us. H100, 2026-11-23, us at M = 16
    for SPLITS 1, 2, 4: (4608, 7168) 14.5, 21, -; (4096, 7168) 12.7, 12.8, 12.9; (2112, 7168) -,
    8.7, 8.2.
    """
    tiles, pairs, splits = ceil_div(N, 64), ceil_div(ceil_div(K, 128), 2), 1
    if tiles >= sms // 2:
        return 1
    while tiles * splits < sms * 0.95 and 2 * splits <= pairs // 2 and splits < 16:
        splits *= 2
    return splits


def default_decode(M: int, N: int, K: int, splits: int, fused: bool, sms: int) -> DecodeConfig:
    """Tiles of 64 rows of w; programs share an SM if there are few."""
    NK = ceil_div(K, 128)
    units = ceil_div(N, 64) * splits
    programs = units if units <= 2 * sms else sms
    warps = 8 if fused and tokens(M) >= 16 else 4  # two warpgroups quantize faster
    config = DecodeConfig(tokens(M), 64, 1, splits, programs // splits * splits, fused, warps)
    most = ceil_div(units, programs) * ceil_div(ceil_div(NK, 2), splits)
    stages = min(decode_stages(config, NK, HALF_SHARED_BYTES), 5, most)
    if stages < min(3, most):
        stages = min(decode_stages(config, NK, SHARED_BYTES), 5, most)
    return replace(config, stages=stages)


def worth_fusing(M: int, K: int, splits: int) -> bool:
    """Whether every program quantizing its part of K beats a kernel for it (about 1.8 us).

    H100, 2026-11-23, linear from bf16 fused and in two kernels, us: (7168, 2048) M = 1 7.1, 8.3;
    M = 8 8.7, 8.7; (3072, 1536) M = 8 5.4, 5.7; M = 16 6.1, 5.8; (7168, 16384) M = 1 61, 43.3.
    """
    part = ceil_div(ceil_div(K, 128), splits)
    return part <= 20 if M <= 4 else M * part <= 100


def splits_candidates(N: int, K: int, sms: int) -> list[int]:
    """Parts of K that decode_gemm may be fastest with: each has two blocks, and SMs take them."""
    NK, tiles = ceil_div(K, 128), ceil_div(N, 64)
    return [s for s in (1, 2, 4, 8, 16) if s == 1 or (2 * s <= NK and tiles * s <= 4 * sms)]


def decode_candidates(
    M: int, N: int, K: int, splits: int, linear: bool, sms: int
) -> list[DecodeConfig]:
    """Configurations that may be fastest for up to 64 rows, the default ones first.

    Two programs an SM with half of its shared memory each, or one with half or all of it.
    """
    NK = ceil_div(K, 128)
    ways = (False, True) if linear and M <= 32 else (False,)
    found = [default_decode(M, N, K, splits, fused, sms) for fused in ways]
    for block_n in (64, 128):
        tiles = ceil_div(N, block_n)
        if block_n == 128 and tiles * splits < 90:
            continue
        for fused in ways:
            for share, budget in (
                (2, HALF_SHARED_BYTES),
                (1, HALF_SHARED_BYTES),
                (1, SHARED_BYTES),
            ):
                groups = min(tiles, share * sms // splits)
                warps = block_n // 16
                if fused and block_n == 64 and tokens(M) >= 16:
                    warps = 8
                config = DecodeConfig(tokens(M), block_n, 1, splits, groups * splits, fused, warps)
                most = ceil_div(tiles, groups) * ceil_div(ceil_div(NK, 2), splits)
                stages = min(decode_stages(config, NK, budget), MAX_STAGES, most)
                if stages >= min(2, most):
                    found.append(replace(config, stages=stages))
    return list(dict.fromkeys(config for config in found if config.stages >= 1))


# us of a tile's block of 128 of K on an SM at about 1.5 GHz, fitted to default_prefill's sweep.
_BLOCK_US = {
    (256, 128): 0.91,
    (128, 128): 0.455,
    (256, 64): 0.48,
    (128, 64): 0.244,
    (128, 32): 0.15,
}
_STAGES = {(256, 128): 4, (128, 128): 6, (256, 64): 5, (128, 64): 8, (128, 32): 10}


def prefill_splits(M: int, N: int, K: int, sms: int) -> int:
    """Parts of K of prefill_gemm: with few rows of w, what fills the SMs in the middle regime."""
    if M > MAX_MIDDLE_ROWS:
        return 1
    most = ceil_div(K, 4 * BLOCK)
    return max(s for s in (1, 2, 4) if s == 1 or (s <= most and ceil_div(N, 32) * s <= sms))


def prefill_candidates(M: int, N: int, K: int, splits: int) -> Iterator[PrefillConfig]:
    """Configurations that may be fastest for more than 64 rows."""
    for (block_m, block_n), stages in _STAGES.items():
        if splits == 1 or block_m == 128:
            yield PrefillConfig(block_m, block_n, stages, splits)


def prefill_bytes(config: PrefillConfig, scale_bytes: int, stages: int, width: int) -> int:
    """Shared memory: the ring, each warpgroup's 64 rows of `width` 16-bit results, barriers."""
    stage = (config.block_m + config.block_n) * 128 + config.block_m * scale_bytes
    return stages * stage + 2 * 64 * width * 2 + 1024


def prefill_stages(config: PrefillConfig, scale_bytes: int) -> tuple[int, int]:
    """Stages, and how many columns of results are stored at a time, that fit.

    Beside float32 scales the largest tiles do not fit whole. Either way costs less than 5 %;
    storing from registers, 20 to 50 %. H100, 2026-11-23.
    """
    stages, width = config.stages, config.block_n
    if prefill_bytes(config, scale_bytes, stages, width) > SHARED_BYTES:
        return (stages - 1, width) if config.block_m == 256 else (stages, width // 2)
    return stages, width


def prefill_cost_us(config: PrefillConfig, M: int, N: int, K: int, sms: int) -> float:
    """About what prefill_gemm takes: waves of tiles times blocks of K, or reading and writing."""
    units = ceil_div(M, config.block_m) * ceil_div(N, config.block_n) * config.splits
    block = _BLOCK_US[config.block_m, config.block_n]
    if config.block_m == 128 and M > 2048:
        block *= 1.15  # of twice the reads from L2
    blocks = ceil_div(ceil_div(K, 128), config.splits)
    time = ceil_div(units, sms) * (blocks * block + 1.15)
    if config.splits > 1:
        time += 3.0 + 1.2e-6 * M * N * config.splits
    return max(time, (N * K + M * K + 2 * M * N) / 2.9e6)


def default_prefill(M: int, N: int, K: int, splits: int, sms: int) -> PrefillConfig:
    """The cheapest of prefill_candidates.

    1.2 % slower than the fastest of any tile and split on the average, 11 % at worst, over
    DeepSeek-V3's 14 shapes and M = 128 to 8192 (H100, 2026-11-23).
    """
    choices = prefill_candidates(M, N, K, splits)
    return min(choices, key=lambda config: prefill_cost_us(config, M, N, K, sms))


def table_path(gpu: str) -> Path:
    """Where the tuned configurations of a GPU are looked up."""
    return TABLES / f"{gpu.replace(' ', '_')}.json"


@cache
def table(gpu: str) -> dict[str, Any]:
    """The tuned configurations of a GPU by "N,K"; empty if it has none."""
    path = table_path(gpu)
    if not path.exists():
        return {}
    shapes: dict[str, Any] = json.loads(path.read_text())["shapes"]
    return shapes


def nearest(entries: dict[str, Any], M: int) -> Any:
    """The entry of the nearest number of rows, by ratio."""
    return entries[min(entries, key=lambda rows: abs(math.log(int(rows) / M)))]


@cache
def device_of(index: int) -> tuple[str, int]:
    """Name and number of SMs of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@cache
def decode_config(
    M: int, N: int, K: int, linear: bool, invariant: bool, index: int
) -> DecodeConfig:
    """linear: from activations, which may be quantized inside. M <= 64."""
    gpu, sms = device_of(index)
    entry = table(gpu).get(f"{N},{K}", {}).get("decode")
    splits = 1 if invariant else entry["splits"] if entry else default_splits(N, K, sms)
    if entry and not invariant:
        # Above 8 rows, one that was tuned for as large a tile, so that its stages fit.
        found = nearest(entry["linear" if linear else "gemm"], M if M <= 8 else tokens(M))
        config = DecodeConfig(tokens(M), splits=splits, **found)
        NK = ceil_div(K, 128)
        room = decode_stages(config, NK, SHARED_BYTES)
        if room >= config.stages:
            return config
    fused = linear and worth_fusing(M, K, splits)
    return default_decode(M, N, K, splits, fused, sms)


@cache
def prefill_config(M: int, N: int, K: int, invariant: bool, index: int) -> PrefillConfig:
    """M > 64."""
    gpu, sms = device_of(index)
    splits = 1 if invariant else prefill_splits(M, N, K, sms)
    entry = table(gpu).get(f"{N},{K}", {}).get("prefill")
    if entry:
        found = PrefillConfig(**nearest(entry, M))
        if found.splits == splits:
            return found
    return default_prefill(M, N, K, splits, sms)
