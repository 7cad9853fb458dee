"""vLLM's side: the quantization method `ue8m0`, registered by the entry point below.

`register` runs in every vLLM process of the environment, also for models that have nothing to do
with this project. It is therefore idempotent, never raises, and imports neither Triton nor any
model code.
"""

from __future__ import annotations


def register() -> None:
    """Entry point `ue8m0` in `vllm.general_plugins`: make `--quantization ue8m0` known."""
    try:
        from .config import register_method

        register_method()
    except Exception:
        import logging

        logging.getLogger("vllm").exception(
            "vllm_ue8m0 could not register the quantization method ue8m0; vLLM goes on without it"
        )
