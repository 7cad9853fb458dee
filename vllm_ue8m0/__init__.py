"""Block FP8 with UE8M0 (power-of-two) scales for vLLM, and the operators behind it.

`from vllm_ue8m0 import act_quant, weight_dequant, fp8_gemm` gives the operators under the names
and argument orders of DeepSeek-V3's `inference/kernel.py`. Importing this package loads neither
triton nor vllm and does not touch CUDA; the names below are resolved on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "act_quant": "ops",
    "silu_mul_quant": "ops",
    "rms_norm_quant": "ops",
    "weight_quant": "ops",
    "weight_dequant": "ops",
    "fp8_gemm": "ops",
    "convert_scale_to_ue8m0": "codec",
    "convert_scale_from_ue8m0": "codec",
    "QuantSpec": "formats",
    "convert": "checkpoint.convert",
    "inspect": "checkpoint.inspect",
    "verify": "checkpoint.verify",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
