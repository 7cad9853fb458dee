"""What a result was measured on: the GPU, and the versions of what ran."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from . import BenchError


@dataclass(frozen=True)
class Machine:
    gpu: str
    versions: dict[str, str | None]
    date: str


SHOW = "show what was recorded there: `vllm-ue8m0 bench show FILE.jsonl`"


def require_gpu(otherwise: str = SHOW) -> None:
    """BenchError if there is no CUDA device to measure on; `otherwise`: what can be done then."""
    if not torch.cuda.is_available():
        kind = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise BenchError(
            f"no CUDA device (torch {torch.__version__} is {kind}); benchmarks measure a GPU. Run "
            f"this on a machine with one, or {otherwise}"
        )


def describe() -> Machine:
    """The current CUDA device and today's date."""
    versions = {
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "vllm": _installed("vllm"),
        "vllm_ue8m0": __version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    return Machine(torch.cuda.get_device_name(), versions, date.today().isoformat())


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version; torch knows only the CUDA version that it supports."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = run.stdout.split("\n")
    return lines[0].strip() or None
