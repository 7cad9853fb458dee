"""An inspection as text: tensors folded by pattern, so that 90,000 of them fit on a screen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..columns import table
from .report import Report, Tensor
from .serving import TP_SIZES

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_HEADINGS = ("tensor", "count", "dtype", "shape", "scales", "class", "k of 2^k", "served as")
_ODD = 8  # a minority of a pattern up to this size is listed by name
_PROBLEMS = 20
_BAR = 40


def fold(name: str) -> str:
    """A tensor's name with layer and expert numbers replaced by *."""
    return _NUMBER.sub("*", name)


def text(report: Report, everything: bool = False) -> str:
    """The report for people; `everything` lists each tensor and each problem."""
    total = report.total()
    lines = [report.path, ""]
    rows = _every_row(report.tensors) if everything else _folded_rows(report.tensors)
    lines += [*table([_HEADINGS, *rows], "<><><<><"), ""]
    lines += _sums(report, total)
    lines += _histogram(report)
    lines += _tensor_parallel(report.tensors)
    lines += _problems(report, everything)
    lines.append(_verdict(report))
    # A header may hold lone surrogates, which no terminal's encoding takes.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _every_row(tensors: Iterable[Tensor]) -> Iterator[tuple[str, ...]]:
    for tensor in tensors:
        yield _row(tensor.name, [tensor])


def _folded_rows(tensors: Iterable[Tensor]) -> Iterator[tuple[str, ...]]:
    patterns: dict[str, dict[tuple[object, ...], list[Tensor]]] = defaultdict(dict)
    for t in tensors:
        dtype = t.scale_info.dtype if t.scale_info else ""
        variant = (t.info.dtype, t.info.shape, dtype, t.kind, t.served)
        patterns[fold(t.name)].setdefault(variant, []).append(t)
    for pattern, variants in patterns.items():
        groups = sorted(variants.values(), key=len, reverse=True)
        yield _row(pattern if len(groups[0]) > 1 else groups[0][0].name, groups[0])
        for group in groups[1:]:
            if len(group) > _ODD:
                yield _row(pattern, group)
            else:  # what differs from the rest of its pattern is what one looks for
                yield from _every_row(group)


def _row(name: str, group: Sequence[Tensor]) -> tuple[str, ...]:
    first = group[0]
    exponents: set[int] = set()
    for tensor in group:
        exponents.update(tensor.stats.exponents if tensor.stats else ())
    return (
        name,
        str(len(group)),
        first.info.dtype,
        "x".join(map(str, first.info.shape)),
        first.scale_info.dtype if first.scale_info else "-",
        _class(group),
        f"{min(exponents)} .. {max(exponents)}" if exponents else "-",
        first.served,
    )


def _class(group: Sequence[Tensor]) -> str:
    kind = group[0].kind
    if kind != "factored":
        return kind or "unreadable"
    factors = sorted({tensor.stats.c for tensor in group if tensor.stats and tensor.stats.c})
    if len(factors) == 1:
        return f"factored, c = {factors[0]:.9g}"
    return f"factored, {len(factors)} c in {factors[0]:.9g} .. {factors[-1]:.9g}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda i: -i[1]))


def _sums(report: Report, total: dict[str, object]) -> list[str]:
    counts = {name: value for name, value in total.items() if isinstance(value, dict)}
    lines = [
        f"{total['tensors']} tensors: {_counts(counts['classes'])}",
        f"{total['scales']} scales in {_counts(counts['scale_dtypes']) or 'no'} tensors",
    ]
    bad = {
        "code 0": "code_0",
        "code 255": "code_255",
        "zero": "zero",
        "negative": "negative",
        "infinite": "infinite",
        "NaN": "nan",
    }
    lines.append("of them " + ", ".join(f"{total[key]} {name}" for name, key in bad.items()))
    if total["scales_in_other_shards"]:
        lines.append(f"{total['scales_in_other_shards']} scales lie in another shard (no problem)")
    return [*lines, ""]


def _histogram(report: Report) -> list[str]:
    counts = report.exponents()
    if not counts:
        return []
    top, width = max(counts.values()), len(str(max(counts.values())))
    lines = ["scales by exponent k of 2^k"]
    for k in sorted(counts):
        lines.append(f"{k:5} {counts[k]:{width}} {'#' * max(1, counts[k] * _BAR // top)}")
    return [*lines, ""]


def _tensor_parallel(tensors: Iterable[Tensor]) -> list[str]:
    """A row per pattern that some size cuts; a cell says rows x columns per scale on each rank."""
    found: dict[tuple[str, ...], None] = {}
    refusals: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
    for tensor in tensors:
        if not tensor.cuts:
            continue
        cells = [fold(tensor.name)]
        for size in TP_SIZES:
            grid = tensor.cuts.get(size)
            if isinstance(grid, str):
                refusals[size, grid.removeprefix("refused: ")][cells[0]] = None
                cells.append("refused")
            else:
                cells.append(f"{grid[0]}x{grid[1]}" if grid else "-")
        found[tuple(cells)] = None
    if not found:
        return [f"no tensor-parallel size up to {TP_SIZES[-1]} cuts a block", ""]
    heading = ("scales finer than 128x128 at --tensor-parallel-size", *map(str, TP_SIZES))
    lines = table([heading, *found], "<>>>>>>")
    if refusals:
        lines.append("refused (where it is the experts alone, --enable-expert-parallel helps):")
        for (size, reason), patterns in sorted(refusals.items()):
            more = f" and {len(patterns) - 1} more patterns" if len(patterns) > 1 else ""
            lines.append(f"  {size}: {reason}: {next(iter(patterns))}{more}")
    return [*lines, ""]


def _problems(report: Report, everything: bool) -> list[str]:
    if not report.problems:
        return []
    lines = [f"{len(report.problems)} problems:"]
    shown: Counter[str] = Counter()
    hidden = 0
    for problem in report.problems:
        pattern = fold(problem.tensor)
        shown[pattern] += 1
        if everything or (shown[pattern] <= 2 and len(lines) <= _PROBLEMS):
            lines.append(f"  {problem.tensor} {problem.problem}")
        else:
            hidden += 1
    if hidden:
        lines.append(f"  ... and {hidden} more (--all shows them)")
    return [*lines, ""]


def _verdict(report: Report) -> str:
    if not report.servable or report.spec is None:
        return "--quantization ue8m0 does not serve this checkpoint."
    served = Counter(tensor.served for tensor in report.tensors)
    return (
        f"--quantization ue8m0 serves this checkpoint: {_counts(served)}; "
        f"activation scales {report.spec.activation_scale}."
    )
