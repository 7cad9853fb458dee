"""What vLLM says of this installation: `python -m vllm_ue8m0.plugin.probe`, for `doctor`.

A program of its own, because vLLM takes seconds to import, logs to stdout, and may not be
importable at all. The last line of stdout is a JSON object:

  {"error": why vLLM cannot be imported, or null; if null also
   "platform": "cuda" | "cpu" | ..., "registered": whether `--quantization ue8m0` is known,
   "registration_error": text or null, "warning": of an untested version, or null,
   "deep_gemm": {condition of vLLM's fp8 method: bool, or null where it could not be asked}}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def probe() -> dict[str, Any]:
    """Ask vLLM; never raises an Exception."""
    try:
        from . import compat
    except Exception as error:
        return {"error": _text(error)}
    found: dict[str, Any] = {"error": None, "warning": compat.version_warning()}
    found["platform"] = _ask(compat.platform)
    try:
        from .config import NAME

        found["registered"], found["registration_error"] = compat.knows_method(NAME), None
    except Exception as error:
        found["registered"], found["registration_error"] = False, _text(error)
    conditions = _ask(compat.deep_gemm_conditions) or {}
    found["deep_gemm"] = {name: _ask(condition) for name, condition in conditions.items()}
    return found


def _ask(question: Callable[[], Any]) -> Any:
    """The answer, or None if the question fails: an optional library may be broken in any way."""
    try:
        return question()
    except Exception:
        return None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print("\n" + json.dumps(probe()))
