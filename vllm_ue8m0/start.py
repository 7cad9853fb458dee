"""Start a model as `vllm serve` does, and end: `python -m ... DONE MODEL [vLLM options]`.

A program of its own for `vllm-ue8m0 warmup`, as evaluate/recorder.py is, and like it one of the few
modules that import vLLM. DONE is a file, written when the model is ready or vLLM does not take it:
empty, or the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .evaluate import EvalError
from .evaluate.recorder import engine_args


def main(done: str, model: str, arguments: list[str]) -> int:
    """Start, and say in the file `done` how that went; returns the exit status."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        engine = engine_args(model, arguments)
    except EvalError as error:
        Path(done).write_text(str(error), encoding="utf-8")
        return 1
    engine.quantization = engine.quantization or "ue8m0"
    engine.disable_log_stats = True
    # The server's defaults, e.g. of the rows in a step: vLLM's graphs depend on them.
    LLMEngine.from_engine_args(engine, usage_context=UsageContext.OPENAI_API_SERVER)
    Path(done).write_text("", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
