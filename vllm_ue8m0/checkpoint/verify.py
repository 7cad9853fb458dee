"""Whether two checkpoints hold the same numbers, whatever their formats, shards and scale names.

An FP8 weight's values are code * scale, exact in float64 (4 + 24 bits); every other tensor's are
its elements. Equal means equal value by value, NaN equal to NaN. Tensors are read in pieces of
some rows, so memory does not grow with them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..codec import scale_to_float
from ..columns import table
from ..layouts import ceil_div, expand
from ..reference import e4m3_to_float
from .check import check_scales, declared_block, find_scale, is_fp8_weight, raise_problems
from .shards import DTYPE_BITS, open_checkpoint, read_bytes
from .show import fold

# 1 Mi elements: 8 MiB in float64, about 60 MiB with all temporaries.
_CHUNK_ELEMENTS = 1 << 20
_EXACT_FLOATS = ("BF16", "F16", "F32")
# Different bytes of these can be the same number (-0) or both NaN.
_FLOATS = frozenset({*_EXACT_FLOATS, "F64", "C64", *(d for d in DTYPE_BITS if d[:3] == "F8_")})
_PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # no torch type: compared as bytes


class Difference(NamedTuple):
    """How one tensor compares; a_format and b_format are dtypes, with the scale's where scaled.

    The errors are those of b against a: the largest absolute one, and ||b - a|| / ||a||. inf where
    a value is NaN or infinite on one side only, where a is all zero, and where the shapes differ.
    """

    name: str
    equal: bool
    max_error: float
    relative_error: float
    a_format: str
    b_format: str


@dataclass(frozen=True)
class Comparison:
    """What `verify` found. passed: no tensor on one side only, none beyond the tolerance."""

    a: str
    b: str
    tensors: list[Difference]
    only_in_a: list[str]
    only_in_b: list[str]
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same values."""
        return all(t.equal for t in self.tensors) and not (self.only_in_a or self.only_in_b)

    @property
    def passed(self) -> bool:
        """Equal, or as close as the tolerance asks for."""
        close = all(t.equal or t.relative_error <= self.tolerance for t in self.tensors)
        return self.equal if self.tolerance == 0 else close and not self.only_in_a + self.only_in_b

    def to_json(self) -> dict[str, Any]:
        """The comparison as `verify --json` prints it; JSON has no inf, which becomes null."""
        tensors = [
            {k: None if v == math.inf else v for k, v in t._asdict().items()} for t in self.tensors
        ]
        return {
            "passed": self.passed,
            "equal": self.equal,
            "a": self.a,
            "b": self.b,
            "tolerance": self.tolerance,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "tensors": tensors,
        }


def verify(
    a: str | PathLike[str],
    b: str | PathLike[str],
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the dequantized values of two checkpoint directories, tensor by tensor.

    progress is called with (bytes done, bytes in all). Raises CheckpointError for a checkpoint that
    cannot be read or whose FP8 weights lack usable scales, ValueError for a bad tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"verify: tolerance is {tolerance}; allowed: 0 or a positive number.")
    left, right = _Side(a), _Side(b)
    common = [name for name in left.order() if name in right.names]
    total = sum(left.num_bytes(name) + right.num_bytes(name) for name in common)
    done, tensors = 0, []
    for name in common:
        equal, max_error, relative = _same_shape(left, right, name), math.inf, math.inf
        if equal:
            equal = all(_equal(left, right, name, *piece) for piece in _pieces(left, right, name))
            max_error, relative = (0.0, 0.0) if equal else _errors(left, right, name)
        formats = left.format(name), right.format(name)
        tensors.append(Difference(name, equal, max_error, relative, *formats))
        done += left.num_bytes(name) + right.num_bytes(name)
        if progress is not None:
            progress(done, total)
    tensors.sort()
    return Comparison(
        str(a),
        str(b),
        tensors,
        sorted(left.names - right.names),
        sorted(right.names - left.names),
        tolerance,
    )


class _Side:
    """One of the two checkpoints: its tensors by value."""

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.checkpoint = open_checkpoint(Path(directory))
        self.tensors = self.checkpoint.tensors
        self.block = declared_block(self.checkpoint)
        raise_problems(str(directory), check_scales(self.tensors, (), self.block))
        self.scales = {
            name: scale
            for name, info in self.tensors.items()
            if is_fp8_weight(name, info) and (scale := find_scale(name, self.tensors)) is not None
        }
        self.names = self.tensors.keys() - set(self.scales.values())
        self._scale: tuple[str, torch.Tensor] | None = None

    def order(self) -> list[str]:
        """The tensors as they lie in the files."""

        def position(name: str) -> tuple[str, int]:
            return self.tensors[name].file, self.tensors[name].start

        return sorted(self.names, key=position)

    def num_bytes(self, name: str) -> int:
        return self.tensors[name].end - self.tensors[name].start

    def format(self, name: str) -> str:
        if name not in self.scales:
            return self.tensors[name].dtype
        return f"{self.tensors[name].dtype} / {self.tensors[self.scales[name]].dtype}"

    def scale(self, name: str, start: int, stop: int | None) -> torch.Tensor | None:
        """The float32 scales of rows start:stop of a weight, None for one without scales."""
        if name not in self.scales:
            return None
        if self._scale is None or self._scale[0] != name:
            scale = scale_to_float(self.checkpoint.load(self.scales[name]))
            self._scale = name, scale
        last = None if stop is None else ceil_div(stop, self.block[0])
        return self._scale[1][start // self.block[0] : last]

    def raw(self, name: str, start: int, stop: int | None) -> bytearray:
        """The bytes of rows start:stop."""
        info = self.tensors[name]
        size = info.end - info.start
        if stop is None:
            return read_bytes(info, 0, size)
        row = size // info.shape[0]
        return read_bytes(info, start * row, (stop - start) * row)

    def values(self, name: str, start: int, stop: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The values of rows start:stop."""
        loaded = self.checkpoint.load(name, start, stop)
        if loaded.dtype == torch.float8_e8m0fnu:
            loaded = scale_to_float(loaded)
        if loaded.is_complex():
            loaded = torch.view_as_real(loaded)
        scale = self.scale(name, start, stop)
        if scale is None:
            return loaded.to(dtype)
        rows, columns = loaded.shape
        values = e4m3_to_float(loaded).to(dtype)
        return values.mul_(expand(scale.to(dtype), rows, columns, self.block))

    def is_exact_in_float32(self, name: str, scale: torch.Tensor | None) -> bool:
        if scale is None:
            return self.tensors[name].dtype in _EXACT_FLOATS
        mantissa, exponent = torch.frexp(scale)
        return bool(((mantissa == 0.5) & (exponent.abs() < 100)).all())


def _pieces(left: _Side, right: _Side, name: str) -> Iterator[tuple[int, int | None]]:
    """Row ranges of whole blocks on both sides; (0, None) for a tensor that has no rows."""
    shape = left.tensors[name].shape
    if not shape or 0 in shape:
        yield 0, None
        return
    unit = 1
    if name in left.scales or name in right.scales:
        unit = math.lcm(left.block[0], right.block[0])
    step = max(_CHUNK_ELEMENTS // math.prod(shape[1:]) // unit, 1) * unit
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _same_shape(left: _Side, right: _Side, name: str) -> bool:
    return left.tensors[name].shape == right.tensors[name].shape


def _equal(left: _Side, right: _Side, name: str, start: int, stop: int | None) -> bool:
    """Whether rows start:stop hold the same values."""
    a_scale, b_scale = left.scale(name, start, stop), right.scale(name, start, stop)
    dtypes = {left.tensors[name].dtype, right.tensors[name].dtype}
    if len(dtypes) == 1 and _same_scales(a_scale, b_scale):
        if left.raw(name, start, stop) == right.raw(name, start, stop):
            return True
        if not dtypes & _FLOATS:
            return False
    if dtypes & _PACKED:
        return False
    exact = left.is_exact_in_float32(name, a_scale) and right.is_exact_in_float32(name, b_scale)
    dtype = torch.float32 if exact else torch.float64
    a, b = (side.values(name, start, stop, dtype) for side in (left, right))
    return bool((a == b).all()) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _same_scales(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _errors(left: _Side, right: _Side, name: str) -> tuple[float, float]:
    """The largest absolute and the relative error of a tensor that differs."""
    if {left.tensors[name].dtype, right.tensors[name].dtype} & _PACKED:
        return math.inf, math.inf
    largest = error = norm = 0.0
    for start, stop in _pieces(left, right, name):
        a, b = (side.values(name, start, stop, torch.float64) for side in (left, right))
        gap = (b - a).abs_()
        if not bool(gap.max().isfinite()):  # NaN and infinities on both sides are no difference
            gap.masked_fill_((a == b) | (a.isnan() & b.isnan()), 0.0)
            gap.nan_to_num_(nan=math.inf, posinf=math.inf)
            a.masked_fill_(~a.isfinite(), 0.0)
        largest = max(largest, float(gap.max()))
        error += float(gap.view(-1).dot(gap.view(-1)))
        norm += float(a.view(-1).dot(a.view(-1)))
    if not math.isfinite(error) or norm == 0:
        return largest, math.inf if error else 0.0
    return largest, math.sqrt(error / norm)


def text(found: Comparison, everything: bool = False) -> str:
    """The comparison for people: what differs, folded by pattern, or every tensor."""
    different = [t for t in found.tensors if not t.equal]
    rows = [("tensor", "count", "in A", "in B", "largest error", "relative error")]
    groups: dict[tuple[str, ...], list[Difference]] = defaultdict(list)
    for t in found.tensors if everything else different:
        groups[t.name if everything else fold(t.name), t.a_format, t.b_format].append(t)
    for (name, a_format, b_format), group in groups.items():
        errors = (max(t.max_error for t in group), max(t.relative_error for t in group))
        error, relative = (f"{e:.6g}" for e in errors)
        error = "equal" if group[0].equal else error
        rows.append((name, str(len(group)), a_format, b_format, error, relative))
    lines = [f"A  {found.a}", f"B  {found.b}", ""]
    lines += [*table(rows, "<><<>>"), ""] if len(rows) > 1 else []
    for where, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            some = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            lines += [f"{len(names)} tensors are in {where} only: {some}"]
    lines.append(
        f"{len(found.tensors) - len(different)} tensors are equal, {len(different)} differ."
    )
    if different and found.tolerance:
        far = sum(t.relative_error > found.tolerance for t in different)
        lines.append(f"{far} differ by more than {found.tolerance:g} (relative).")
    return "\n".join(lines).encode(errors="backslashreplace").decode()
