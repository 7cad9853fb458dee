"""Which backend runs an operator: one table, printable, with the reason for every refusal.

A backend is a module with the operators' names and signatures of `reference`. The choice is made
by operator and device, once; `auto` never leaves a GPU for the CPU's backend, and a backend named
by UE8M0_BACKEND is that backend or an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

QUANT_OPERATORS = (
    "act_quant",
    "silu_mul_quant",
    "rms_norm_quant",
    "add_rms_norm",
    "weight_quant",
    "weight_dequant",
)
PRODUCT_OPERATORS = ("gemm", "linear", "experts", "batched_experts")
OPERATORS = QUANT_OPERATORS + PRODUCT_OPERATORS
MIN_CAPABILITY = (8, 0)  # Triton's, and bf16's


@dataclass(frozen=True)
class Backend:
    """supports(op, device_type, explicit) -> (ok, reason); `explicit`: named by the user."""

    name: str
    module: str
    supports: Callable[[str, str, bool], tuple[bool, str]]
    operators: tuple[str, ...] = OPERATORS

    def load(self) -> ModuleType:
        return _load(self.module)


@cache
def _load(module: str) -> ModuleType:
    return import_module(module, __package__)


def _portable_supports(op: str, device_type: str, explicit: bool) -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "triton is not installed"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return False, f"needs {_sm(MIN_CAPABILITY)} or newer, this GPU is {_sm(capability)}"
        return True, f"Triton kernels for {_sm(capability)}"
    if os.environ.get("TRITON_INTERPRET") == "1" and explicit:
        return True, "Triton's CPU interpreter (TRITON_INTERPRET=1)"
    return False, "Triton kernels run on the CPU only in its interpreter, and only when asked for"


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _reference_supports(op: str, device_type: str, explicit: bool) -> tuple[bool, str]:
    if device_type == "cpu" or explicit:
        return True, "plain torch"
    return False, f"plain torch is not chosen by itself on {device_type}: it would be slow silently"


def _sm90_supports(op: str, device_type: str, explicit: bool) -> tuple[bool, str]:
    if device_type != "cuda" or find_spec("triton") is None:
        return False, "needs a GPU of sm_90 and triton"
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return False, f"needs sm_90, this GPU is {_sm(capability)}"
    try:
        import_module(".sm90", __package__)
    except (ImportError, AttributeError) as error:
        return False, f"needs Gluon as in triton 3.6 or newer: {error}"
    return True, "Gluon kernels for sm_90; portable's where sm90 refuses, with the reason"


def _sm100_supports(op: str, device_type: str, explicit: bool) -> tuple[bool, str]:
    if device_type != "cuda" or find_spec("triton") is None:
        return False, "needs a GPU of sm_100 or sm_103 and triton"
    capability = torch.cuda.get_device_capability()
    if capability[0] != 10:
        return False, f"needs sm_100 or sm_103, this GPU is {_sm(capability)}"
    return True, "Triton kernels scaled by the tensor cores; portable's where sm100 refuses"


BACKENDS = (
    Backend("sm100", ".sm100", _sm100_supports, PRODUCT_OPERATORS),
    Backend("sm90", ".sm90", _sm90_supports, PRODUCT_OPERATORS),
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
def choose(op: str, device_type: str) -> Backend:
    """The backend of an operator on "cpu" or "cuda"; RuntimeError with every reason if none."""
    wanted, reasons = requested(), []
    having = [backend for backend in BACKENDS if op in backend.operators]
    if wanted not in [backend.name for backend in having]:
        wanted = "auto"  # sm90 and sm100 have kernels for some operators; portable's are the rest's
    for backend in having:
        if wanted not in ("auto", backend.name):
            continue
        ok, reason = backend.supports(op, device_type, wanted == backend.name)
        if ok:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(
        f"no ue8m0 backend for {op} on device {device_type!r} (UE8M0_BACKEND={wanted}): "
        + "; ".join(reasons)
    )


class Row(NamedTuple):
    """An operator on a backend. status: "chosen", "usable" (another was chosen) or "refused"."""

    operator: str
    backend: str
    status: str
    reason: str


def rows(device_type: str) -> list[Row]:
    """Every operator on every backend that has it; ValueError if UE8M0_BACKEND names none."""
    found = []
    for op in OPERATORS:
        try:
            chosen = choose(op, device_type)
        except RuntimeError:
            chosen = None
        for backend in BACKENDS:
            if op not in backend.operators:
                continue
            ok, reason = backend.supports(op, device_type, requested() == backend.name)
            status = "chosen" if backend is chosen else "usable" if ok else "refused"
            found.append(Row(op, backend.name, status, reason))
    return found


def table(device_type: str) -> str:
    """One line per operator and backend: chosen or not, and why."""
    return "\n".join(
        f"{row.operator:<15} {row.backend:<10} {row.status:<8} {row.reason}"
        for row in rows(device_type)
    )
