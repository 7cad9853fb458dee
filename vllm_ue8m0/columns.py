"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]], aligned: str) -> list[str]:
    """Lines with a column per character of aligned, "<" left or ">" right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
