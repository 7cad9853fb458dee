"""Pictures: which files can be drawn, and matplotlib, imported when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SUFFIXES = (".svg", ".png", ".pdf")
# Okabe and Ito's colors, which color-blind readers can tell apart.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
)  # fmt: skip


def check(path: str | Path, error: type[Exception]) -> None:
    """Raise `error` if `save` could not write this file: asked before the long work begins."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise error(f"{path}: the name of a plot ends in {', '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise error(f"{path}: there is no directory {Path(path).parent}")
    pyplot(error)


def pyplot(error: type[Exception]) -> Any:
    """matplotlib.pyplot without a display; raises `error`, with what to install, without it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as missing:
        raise error(
            f'plots need matplotlib: pip install "vllm_ue8m0[bench]" ({missing})'
        ) from missing
    return pyplot
