"""What vLLM says of itself and of the plugin, and what its own `fp8` method would do here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

TIMEOUT_S = 300


@dataclass(frozen=True)
class Vllm:
    """plugin/probe.py's answer. error: why vLLM cannot be asked; then nothing else is known."""

    error: str | None = None
    platform: str | None = None
    registered: bool = False
    registration_error: str | None = None
    warning: str | None = None
    deep_gemm: dict[str, bool | None] = field(default_factory=dict)


class StockFp8(NamedTuple):
    """Whether vLLM's own `fp8` method rounds activation scales to powers of two, and why."""

    answer: str  # "no" | "in part" | "unknown"
    reason: str


class Question:
    """The probe, running beside us from the moment this is made."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if find_spec("vllm") is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_ue8m0.plugin.probe"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def answer(self) -> Vllm | None:
        """Wait for it; None if vLLM is not installed."""
        if self._process is None:
            return None
        try:
            out, log = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return Vllm(error=f"importing it took more than {TIMEOUT_S} s")
        lines = out.splitlines()
        try:
            return Vllm(**json.loads(lines[-1] if lines else ""))
        except (ValueError, TypeError):
            last = (log.strip().splitlines() or ["nothing printed"])[-1]
            status = self._process.returncode
            return Vllm(error=f"importing it ended with status {status}: {last}")


# What decides, in the order in which vLLM 0.26 and 0.32 ask: utils/deep_gemm.py,
# is_deep_gemm_e8m0_used. The checkpoint's scale_fmt is not among it.
_REFUSALS = {
    "gpu": "DeepGEMM, the only path that does, runs on sm_90, sm_10x and sm_12x",
    "installed": "DeepGEMM, the only path that does, is not installed",
    "enabled": "VLLM_USE_DEEP_GEMM=0 turns DeepGEMM off",
    "e8m0_enabled": "VLLM_USE_DEEP_GEMM_E8M0=0 turns it off",
    "used": "this DeepGEMM has no fp8_gemm_nt",
}


def stock_fp8(vllm: Vllm | None, capability: str | None) -> StockFp8:
    """Where DeepGEMM would round, the exceptions, as far as they are known (docs/doctor.md)."""
    if vllm is None or vllm.error is not None:
        return StockFp8("unknown", "vLLM cannot be asked")
    asked = {name: vllm.deep_gemm.get(name) for name in _REFUSALS}
    for name, answer in asked.items():
        if answer is False:
            return StockFp8("no", _REFUSALS[name])
    if None in asked.values() or capability is None:
        return StockFp8("unknown", "vLLM does not say whether it would use DeepGEMM")
    if capability != "sm_90":
        return StockFp8(
            "in part",
            "layers on DeepGEMM do; linear layers with N not a multiple of 64 or K not of 128 and "
            "FlashInfer's experts do not (read in its source, not measured)",
        )
    go = {True: "go", None: "may go", False: ""}[vllm.deep_gemm.get("flashinfer_below_32")]
    small = f"; batches below 32 rows {go} to FlashInfer, which does not" if go else ""
    return StockFp8(
        "in part",
        "layers on DeepGEMM do, but not where quantization is fused with a norm or an activation, "
        f"which is the default (measured, vLLM 0.26){small}",
    )
