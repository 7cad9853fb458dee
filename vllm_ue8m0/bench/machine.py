"""What a result was measured on: the GPU, and the versions of what ran."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import torch

from ..versions import versions
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
    return Machine(torch.cuda.get_device_name(), versions(), date.today().isoformat())
