"""`vllm-ue8m0 eval`: how far a served model is from another, in nats per token.

recorder.py    a program that serves one model with vLLM and writes what it predicts
recording.py   the file between: tokens, and the likeliest tokens at every position
metrics.py     two recordings -> KL, top-1 agreement, perplexity
report.py      those, as text and as JSON
command.py     what the command line calls

A side is a process of its own, so its memory is free before the other starts, and it may have run
elsewhere. Importing this package loads nothing.
"""

TOP_K = 100
CONTEXT = 2048


class EvalError(RuntimeError):
    """An evaluation that cannot be made; the text says what was found and what to do."""
