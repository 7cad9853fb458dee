"""Scale tensors read by their byte ranges and classified, thousands at a time.

The class is that of `codec.factor_scales`, which serving and `convert` use too. A scale that is
zero or below 2^-126 (code 0 is 2^-127) is judged by its block of the weight: over zeros it does
not matter, anywhere else it is a fault. Weights are read for such blocks alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch

from ..codec import factor_scales, scale_to_float
from ..layouts import grid_shape, used_blocks
from .shards import TensorInfo, read_bytes, torch_dtype

BYTE_DTYPES = ("F8_E8M0", "U8")
_BATCH_BYTES = 1 << 23
_NORMAL, _INF, _MAGNITUDE = 0x00800000, 0x7F800000, 0x7FFFFFFF


class ScaleStats(NamedTuple):
    """What the scales of one weight are.

    exponents counts k of 2^k <= scale < 2^(k+1) over positive normal scales; the counts behind it
    are of what is not; fault is a sentence about the first scale that cannot be served, or None.
    """

    kind: str  # ScaleClass's values: pow2, factored, arbitrary
    c: float | None  # None if arbitrary
    num_scales: int
    exponents: dict[int, int]
    nan: int = 0
    inf: int = 0
    negative: int = 0
    zero: int = 0
    subnormal: int = 0  # code 0 in a byte container
    fault: str | None = None


class Pair(NamedTuple):
    """A scale tensor, and its weight if the two fit together."""

    scale: TensorInfo
    weight: TensorInfo | None
    block: tuple[int, int]


def read_stats(pairs: Mapping[str, Pair]) -> dict[str, ScaleStats]:
    """The statistics of every pair, by the pairs' keys; memory does not grow with the scales."""
    found: dict[str, ScaleStats] = {}
    pending: dict[tuple[str, int], list[tuple[str, bytes]]] = {}
    filled = 0
    for name, data in _read(pairs):
        info = pairs[name].scale
        pending.setdefault((info.dtype, prod(info.shape)), []).append((name, data))
        filled += len(data)
        if filled >= _BATCH_BYTES:
            _classify_all(pending, pairs, found)
            filled = 0
    _classify_all(pending, pairs, found)
    return found


def _position(pair: Pair) -> tuple[str, int]:
    return pair.scale.file, pair.scale.start


def _read(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, bytes]]:
    """Every scale tensor's bytes, in the order in which they lie in the files."""
    opened, path = -1, None
    try:
        for name in sorted(pairs, key=lambda name: _position(pairs[name])):
            info = pairs[name].scale
            if info.file != path:
                if opened >= 0:
                    os.close(opened)
                opened, path = os.open(info.file, os.O_RDONLY), info.file
            size = info.end - info.start
            data = os.pread(opened, size, info.start)
            if len(data) != size:  # a read of more than 2 GiB, or a file that has shrunk
                data = bytes(read_bytes(info, 0, size))
            yield name, data
    finally:
        if opened >= 0:
            os.close(opened)


def _classify_all(
    pending: dict[tuple[str, int], list[tuple[str, bytes]]],
    pairs: Mapping[str, Pair],
    found: dict[str, ScaleStats],
) -> None:
    for (dtype, count), group in pending.items():
        names = [name for name, _ in group]
        if count == 0:
            found |= dict.fromkeys(names, ScaleStats("pow2", 1.0, 0, {}))
            continue
        data = bytearray().join(data for _, data in group)
        stored = torch.frombuffer(data, dtype=torch_dtype(names[0], dtype)).view(len(group), count)
        rows = _classify(scale_to_float(stored), names, pairs)
        found |= zip(names, rows, strict=True)
    pending.clear()


def _classify(
    scale: torch.Tensor, names: list[str], pairs: Mapping[str, Pair]
) -> Iterable[ScaleStats]:
    """One ScaleStats per row of scale [S, n] float32."""
    bits = scale.view(torch.int32)
    good = (bits >= _NORMAL) & (bits < _INF)
    plain = good.all(-1)
    _, c, exact = factor_scales(scale, None if bool(plain.all()) else good)
    rows = zip(names, c.tolist(), exact.tolist(), _exponents(bits, good), strict=True)
    for row, (name, factor, factored, exponents) in enumerate(rows):
        kind = ("pow2" if factor == 1.0 else "factored") if factored else "arbitrary"
        stats = ScaleStats(kind, factor if factored else None, scale.shape[1], exponents)
        yield stats if plain[row] else _judge(stats, scale[row], pairs[name])


def _exponents(bits: torch.Tensor, good: torch.Tensor) -> list[dict[int, int]]:
    S = len(bits)
    # 0 stands for what is not counted: it is no exponent field of a normal number.
    fields = torch.where(good, bits >> 23, 0)
    fields += torch.arange(S, dtype=torch.int32)[:, None] * 256
    counts = torch.bincount(fields.view(-1), minlength=S * 256).view(S, 256)
    result: list[dict[int, int]] = [{} for _ in range(S)]
    where = counts.nonzero()
    values = counts[where[:, 0], where[:, 1]]
    for (row, field), value in zip(where.tolist(), values.tolist(), strict=True):
        if field:
            result[row][field - 127] = value
    return result


def _judge(stats: ScaleStats, scale: torch.Tensor, pair: Pair) -> ScaleStats:
    """Count what is not a positive normal number, and find the first that cannot be served."""
    bits = scale.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    negative = (bits < 0) & (magnitude != 0) & (magnitude < _INF)
    small = (magnitude < _NORMAL) & ~negative
    zero = magnitude == 0
    masks = {"NaN": magnitude > _INF, "infinite": magnitude == _INF, "negative": negative}
    counts = [int(mask.sum()) for mask in masks.values()]
    if counts[0] and pair.scale.dtype in BYTE_DTYPES:
        masks = {"NaN (byte 255)": masks.pop("NaN"), **masks}
    fault = next((_fault(mask, what, pair) for what, mask in masks.items() if mask.any()), None)
    if fault is None and pair.weight is not None:
        used = small.view(pair.scale.shape) & read_used_blocks(pair.weight, pair.block, small)
        if used.any():
            byte = " (byte 0)" if pair.scale.dtype in BYTE_DTYPES else ""
            fault = _fault(used.view(-1), f"zero or below 2^-126{byte}", pair)
    tiny = int((small & ~zero).sum())
    return stats._replace(
        nan=counts[0],
        inf=counts[1],
        negative=counts[2],
        zero=int(zero.sum()),
        subnormal=tiny,
        fault=fault,
    )


def _fault(mask: torch.Tensor, what: str, pair: Pair) -> str:
    index = [int(i) for i in mask.view(pair.scale.shape).nonzero()[0]]
    share = f"{int(mask.sum())} of {mask.numel()}"
    over = ", but the block's weights are not zero" if what.startswith("zero") else ""
    return (
        f"is {what} for block {index} ({share} scales){over}; every scale has to be a positive "
        "finite number. The checkpoint is damaged: fetch it again."
    )


def read_used_blocks(
    weight: TensorInfo, block: tuple[int, int], asked: torch.Tensor
) -> torch.Tensor:
    """layouts.used_blocks of a weight in a file, of which only the rows of blocks are read that
    have a True in `asked`; the others are False."""
    N, K = weight.shape
    used = torch.zeros(grid_shape(N, K, block), dtype=torch.bool)
    for row in map(int, asked.view(used.shape).any(1).nonzero()[:, 0]):
        height = min(block[0], N - row * block[0])
        data = read_bytes(weight, row * block[0] * K, height * K)
        codes = torch.frombuffer(data, dtype=torch.uint8).view(height, K)
        used[row] = used_blocks(codes, block)[0]
    return used
