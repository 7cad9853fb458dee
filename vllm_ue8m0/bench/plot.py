"""Results as a picture: a panel per operator and variant, ours beside the others.

Results of one variant at three or more M are lines over M. What is left of an operator is one
panel with a row per result, as multiples of our time, so that sizes can be compared. Products of
one benchmark are points under the roof: speed over flops per byte; but a layer of products, which
has no single N, is lines over M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from textwrap import fill
from typing import Any

from .. import pictures
from . import BenchError
from .records import Record, describe_variant
from .table import EMPTY, by_bench, names

MIN_POINTS = 3
COLUMNS, PANEL = 3, (6.6, 4.2)
COLORS = (  # ours is the first
    pictures.BLUE, pictures.VERMILION, pictures.GREEN, pictures.PINK, pictures.ORANGE, pictures.SKY
)  # fmt: skip
GRAY = "#666666"
LIMIT, ROOF = "copy of as many bytes", "roof"

Times = Callable[[Record], float | None]
Series = tuple[str, Times, dict[str, Any]]
Draw = Callable[[Any, Sequence[Record]], None]


def check(path: str | Path) -> None:
    """BenchError if `save` could not write this file: asked before anything is measured."""
    pictures.check(path, BenchError)


def save(records: Sequence[Record], path: str | Path) -> None:
    """Draw records into an .svg, .png or .pdf file."""
    check(path)
    pyplot = pictures.pyplot(BenchError)
    with pyplot.rc_context({"svg.fonttype": "none"}):  # text stays text: sharp and searchable
        figure = _draw(pyplot, records)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _draw(pyplot: Any, records: Sequence[Record]) -> Any:
    panels = [panel for group in by_bench(records).values() for panel in _panels(group)]
    columns = min(COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    size = (PANEL[0] * columns, PANEL[1] * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, group, draw) in zip(axes.flat, panels, strict=False):
        draw(ax, group)
        ax.set_title(fill(title, 64), fontsize=10)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    measured = dict.fromkeys(f"{record.gpu}, {record.date}" for record in records)
    times = any(draw is not _draw_roofline for _, _, draw in panels)
    what = "time per call, lower is better" if times else "speed of products, higher is better"
    figure.suptitle(f"{what} ({'; '.join(measured)})", fontsize=12)
    return figure


def _panels(records: Sequence[Record]) -> list[tuple[str, list[Record], Draw]]:
    """(title, records, how to draw them) of one operator."""
    products = [record for record in records if record.flops and record.num_bytes and record.N]
    if products:
        return [(records[0].bench, products, _draw_roofline)]
    series: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        key = (record.N, record.K, *sorted(record.variant.items()))
        series.setdefault(key, []).append(record)
    panels: list[tuple[str, list[Record], Draw]] = []
    rest = []
    for group in series.values():
        if len({record.M for record in group} - {None}) < MIN_POINTS:
            rest += group
            continue
        first = group[0]
        sizes = [f"{name}={size}" for name, size in (("N", first.N), ("K", first.K)) if size]
        title = ", ".join([first.bench, *sizes, describe_variant(first.variant)])
        panels.append((title, sorted(group, key=lambda record: record.M or 0), _draw_over_m))
    if rest:
        title = f"{records[0].bench}, {'other' if panels else 'all'} cases"
        panels.append((title, rest, _draw_rows))
    return panels


def _series(records: Sequence[Record]) -> list[Series]:
    """(label, its time in a record, style) of everything that was timed beside ours."""

    def times(kind: str, name: str) -> Times:
        return lambda record: _field(record, kind).get(name)

    series: list[Series] = [
        ("ours", lambda record: record.ours_us, {"color": COLORS[0], "marker": "o", "zorder": 3})
    ]
    others = [("peers_us", name) for name in names(records, "peers_us")]
    context = names(records, "context_us")  # the table has what follows an empty kernel
    others += [("context_us", name) for name in context if not name.startswith(EMPTY)]
    for i, (kind, name) in enumerate(others):
        style = {"color": COLORS[1 + i % (len(COLORS) - 1)], "marker": "s"}
        if kind == "context_us":
            style |= {"linestyle": ":", "marker": "x"}
        label = name if kind == "peers_us" else f"{name} (other work)"
        series.append((label, times(kind, name), style))
    limit = {"color": GRAY, "linestyle": "--", "marker": "|"}
    bound = ROOF if any(record.roof for record in records) else LIMIT
    series.append((bound, lambda record: record.limit_us, limit))
    empty = {"color": GRAY, "linestyle": ":", "marker": "."}
    series.append(("empty kernel", times("context_us", EMPTY), empty))
    return series


def _field(record: Record, kind: str) -> Mapping[str, float]:
    return record.peers_us if kind == "peers_us" else record.context_us


def _draw_over_m(ax: Any, records: Sequence[Record]) -> None:
    for label, time_us, style in _series(records):
        points = [(record.M, t) for record in records if (t := time_us(record)) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
    rows = sorted({record.M for record in records if record.M})
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows, [str(M) for M in rows], fontsize=8, rotation=45)
    ax.minorticks_off()
    ax.set_yscale("log")
    ax.set_xlabel("M")
    ax.set_ylabel("us")
    ax.grid(True, which="major", alpha=0.3)
    ax.legend(fontsize=8)


def _draw_rows(ax: Any, records: Sequence[Record]) -> None:
    for label, time_us, style in _series(records):
        points = [
            (t / record.ours_us, y)
            for y, record in enumerate(records)
            if (t := time_us(record)) is not None
        ]
        if points:
            marks = {**style, "linestyle": "none", "markersize": 8}
            ax.plot(*zip(*points, strict=True), label=label, **marks)
    ax.set_yticks(range(len(records)), [_row_label(record) for record in records], fontsize=8)
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.set_xlim(0, max(1.25, ax.get_xlim()[1]))
    ax.set_xlabel("time / ours")
    ax.axvline(1, color=COLORS[0], linewidth=1, zorder=0)
    ax.grid(True, axis="x", alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_roofline(ax: Any, records: Sequence[Record]) -> None:
    intensities = [_intensity(record) for record in records]
    for label, time_us, style in _series(records):
        points = [
            (x, (record.flops or 0) / t / 1e6)
            for x, record in zip(intensities, records, strict=True)
            if (t := time_us(record)) is not None
        ]
        if points and label not in (LIMIT, ROOF):
            marks = {"alpha": 0.8, **style, "linestyle": "none", "markersize": 4}
            ax.plot(*zip(*points, strict=True), label=label, **marks)
    roofs = {tuple(sorted(record.roof.items())) for record in records if record.roof}
    for roof in map(dict, sorted(roofs)):
        left, right = min(intensities) / 1.5, max(intensities) * 1.5
        xs = [left, min(max(roof["tflops"] / roof["tb_per_s"], left), right), right]
        ys = [min(x * roof["tb_per_s"], roof["tflops"]) for x in xs]
        text = f"{roof['tb_per_s']:.2f} TB/s, {roof['tflops']:.0f} TFLOPS"
        ax.plot(xs, ys, color=GRAY, linestyle="--", linewidth=1, label=text)
    powers = [2**k for k in range(int(log2(min(intensities))), ceil(log2(max(intensities))) + 1)]
    ax.set_xscale("log", base=2)
    ax.set_xticks(powers, [str(power) for power in powers], fontsize=8)
    ax.set_yscale("log")
    ax.set_xlabel("flops per byte")
    ax.set_ylabel("TFLOPS")
    ax.grid(True, which="both", alpha=0.2)
    ax.legend(fontsize=8)


def _intensity(record: Record) -> float:
    return (record.flops or 0) / (record.num_bytes or 1)


def _row_label(record: Record) -> str:
    sizes = [f"{name}={size}" for name in "MNK" if (size := getattr(record, name))]
    words = [
        *sizes,
        describe_variant(record.variant),
        f"({record.ours_us:.1f}\N{NO-BREAK SPACE}us)",
    ]
    return fill(" ".join(words), 38)
