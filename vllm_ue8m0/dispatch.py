"""Which backend runs an operator: one table, printable, with the reason for every refusal.

A backend is a module with the operators' names and signatures of `reference`. The choice is made
by device, once; `auto` never leaves a GPU for the CPU's backend, and a backend named by
UE8M0_BACKEND is that backend or an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

OPERATORS = ("act_quant", "weight_dequant", "gemm", "linear", "experts")
MIN_CAPABILITY = (8, 9)  # Triton's e4m3 (fp8e4nv) starts at sm_89


@dataclass(frozen=True)
class Backend:
    """supports(device_type, explicit) -> (ok, reason); `explicit`: named by the user."""

    name: str
    module: str
    supports: Callable[[str, bool], tuple[bool, str]]

    def load(self) -> ModuleType:
        return import_module(self.module, __package__)


def _portable_supports(device_type: str, explicit: bool) -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "triton is not installed"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return False, f"needs sm_89 or newer, this GPU is sm_{capability[0]}{capability[1]}"
        return True, f"Triton kernels for sm_{capability[0]}{capability[1]}"
    if os.environ.get("TRITON_INTERPRET") == "1" and explicit:
        return True, "Triton's CPU interpreter (TRITON_INTERPRET=1)"
    return False, "Triton kernels run on the CPU only in its interpreter, and only when asked for"


def _reference_supports(device_type: str, explicit: bool) -> tuple[bool, str]:
    if device_type == "cpu" or explicit:
        return True, "plain torch"
    return False, f"plain torch is not chosen by itself on {device_type}: it would be slow silently"


BACKENDS = (
    Backend("portable", ".portable", _portable_supports),
    Backend("reference", ".reference", _reference_supports),
)


def requested() -> str:
    """The backend the user asked for: UE8M0_BACKEND, `auto` by default."""
    name = os.environ.get("UE8M0_BACKEND", "auto")
    allowed = ["auto", *(backend.name for backend in BACKENDS)]
    if name not in allowed:
        raise ValueError(f"UE8M0_BACKEND is {name!r}; allowed: {', '.join(allowed)}")
    return name


@cache
def choose(device_type: str) -> Backend:
    """The backend for a device type ("cpu", "cuda"); RuntimeError with every reason if none."""
    wanted, reasons = requested(), []
    for backend in BACKENDS:
        if wanted not in ("auto", backend.name):
            continue
        ok, reason = backend.supports(device_type, wanted == backend.name)
        if ok:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(
        f"no ue8m0 backend for device {device_type!r} (UE8M0_BACKEND={wanted}): "
        + "; ".join(reasons)
    )


def table(device_type: str) -> str:
    """One line per backend: chosen or not, and why."""
    chosen, lines = choose(device_type), []
    for backend in BACKENDS:
        ok, reason = backend.supports(device_type, requested() == backend.name)
        mark = "chosen " if backend is chosen else "usable " if ok else "refused"
        lines.append(f"{mark}  {backend.name:<10} {', '.join(OPERATORS)}: {reason}")
    return "\n".join(lines)
