"""The exponents of a checkpoint's scales as a picture, stacked by class.

matplotlib is imported when a picture is asked for.
"""

from __future__ import annotations

from pathlib import Path

from .. import pictures
from .report import Report
from .shards import CheckpointError

_COLORS = {"pow2": pictures.BLUE, "factored": pictures.ORANGE, "arbitrary": pictures.VERMILION}
_LABELS = {"pow2": "2^k", "factored": "c * 2^k", "arbitrary": "neither"}


def check(path: str | Path) -> None:
    """CheckpointError if `save` could not write this file: asked before anything is read."""
    pictures.check(path, CheckpointError)


def save(report: Report, path: str | Path) -> None:
    """Draw the number of scales by exponent into an .svg, .png or .pdf file."""
    check(path)
    pyplot = pictures.pyplot(CheckpointError)
    with pyplot.rc_context({"svg.fonttype": "none"}):  # text stays text: sharp and searchable
        figure, ax = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        below: dict[int, int] = {}
        for kind, color in _COLORS.items():
            counts = report.exponents(kind)
            if not counts:
                continue
            exponents = sorted(counts)
            ax.bar(
                exponents,
                [counts[k] for k in exponents],
                bottom=[below.get(k, 0) for k in exponents],
                color=color,
                label=f"{_LABELS[kind]} ({sum(counts.values())})",
            )
            below = {k: below.get(k, 0) + counts[k] for k in {*below, *counts}}
        ax.set_xlabel("k: a scale is 2^k <= scale < 2^(k+1)")
        ax.set_ylabel("scales")
        ax.set_title(f"{Path(report.path).resolve().name}: exponents of weight scales")
        ax.grid(True, axis="y", alpha=0.3)
        if below:
            ax.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
