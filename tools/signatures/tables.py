"""README's tables of tested versions: a row for each signature file, with what was run.

What was run is in runs.json, {library: {release: {"cpu" | "gpu": text}}}: only what really was.
"""

from __future__ import annotations

import json
from pathlib import Path

from .libraries import LIBRARIES, ROOT, Library

README = ROOT / "README.md"
RUNS = Path(__file__).with_name("runs.json")
TITLES = {"vllm": "vLLM", "triton": "Triton"}


def table(library: Library) -> str:
    """The library's table, newest release first."""
    runs = json.loads(RUNS.read_text("utf-8"))[library.name]
    unknown = sorted(set(runs) - set(library.releases()))
    if unknown:
        raise ValueError(
            f"{RUNS.name}: {library.name} {', '.join(unknown)} was run but has no signature file: "
            f"python -m tools.signatures {library.name} {' '.join(unknown)}"
        )
    lines = [header(library), "|---|---|---|---|"]
    for release in reversed(library.releases()):
        run = runs.get(release, {})
        lines.append(f"| {release} | checked | {run.get('cpu', '')} | {run.get('gpu', '')} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def header(library: Library) -> str:
    return f"| {TITLES[library.name]} | signatures | run on a CPU | run on a GPU |"


def with_tables(text: str) -> str:
    """README's text with every table as it should be."""
    for library in LIBRARIES.values():
        lines = text.split("\n")
        start = lines.index(header(library))
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        text = "\n".join([*lines[:start], table(library), *lines[end:]])
    return text


def write_tables() -> None:
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
