"""One side of `bench e2e`: start vLLM, measure, write: `python -m ... JOB.json`, for e2e.py.

A program of its own, because a start is measured from its beginning, the sides must not share a
GPU's memory, and vLLM's CPU build may abort at exit. JOB.json:

  {"engine": vLLM's arguments, "begun": time.time() before it was started, "vocabulary": tokens,
   "decode": [batches], "context": tokens of their prompts, "steps": steps to time,
   "prefill": [prompts, tokens] or null, "out": file, "error": file for the text of an error}

Into `out`, after each measurement, what there is so far:

  {"start_s": seconds until requests are taken, "gpu": name, "memory": bytes beside the KV cache,
   "decode": {batch: {"gpu_us", "wall_us", "parts", "kernels"}}, "prefill": {"gpu_us", "wall_us"}}
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import e2e_worker

WARM_STEPS, PROFILED_STEPS, PREFILLS = 8, 8, 5


def main(job_file: str) -> int:
    """Do the job; returns the exit status."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    result: dict[str, Any] = {}

    def keep() -> None:
        new = out.with_name(f"{out.name}.new")
        new.write_text(json.dumps(result), encoding="utf-8")
        new.replace(out)

    from vllm import LLM

    try:
        llm = LLM(**job["engine"])
    except Exception as error:
        Path(job["error"]).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    result["start_s"] = time.time() - job["begun"]
    result |= llm.collective_rpc(e2e_worker.describe)[0]
    keep()
    if not job["decode"] and not job["prefill"]:
        return 0
    say(f"{llm.collective_rpc(e2e_worker.fill)[0]} parameters filled with random values")
    llm.collective_rpc(e2e_worker.watch)
    prompts = Prompts(job["vocabulary"])
    if job["prefill"]:
        result["prefill"] = prefill(llm, prompts, *job["prefill"])
        say(f"prefill: {result['prefill']}")
        keep()
    for batch in job["decode"]:
        measured = decode(llm, prompts, batch, job["context"], job["steps"])
        result.setdefault("decode", {})[str(batch)] = measured
        say(f"decode, batch {batch}: { {k: v for k, v in measured.items() if k != 'kernels'} }")
        keep()
    return 0


def say(line: str) -> None:
    print(f"bench e2e: {line}", flush=True)


class Prompts:
    """Random tokens, the same sequence on every side."""

    def __init__(self, vocabulary: int) -> None:
        self._random, self._vocabulary = random.Random(0), vocabulary

    def draw(self, count: int, tokens: int) -> list[dict[str, list[int]]]:
        choices = range(self._vocabulary)
        return [{"prompt_token_ids": self._random.choices(choices, k=tokens)} for _ in range(count)]


def generate(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> float:
    """Greedily, `tokens` for each prompt; seconds."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begun


def read(llm: Any, prompts: list[dict[str, list[int]]]) -> float:
    """The first token of every prompt; seconds.

    All prompts are there when the first is scheduled. Sent one by one, the first would be a step of
    its own in some runs and not in others (2026-11-23: two steps or three, 15 ms apart).
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    llm.sleep(level=0)
    llm.enqueue(prompts, params, use_tqdm=False)
    begun = time.perf_counter()
    llm.wake_up(tags=["scheduling"])
    llm.wait_for_completion(use_tqdm=False)
    return time.perf_counter() - begun


def timed(llm: Any, work: Callable[[], float]) -> list[tuple[int, float]]:
    """Rows and us of each step of a generation, on the first rank."""
    llm.collective_rpc(e2e_worker.time_steps, args=(True,))
    work()
    steps: list[tuple[int, float]] = llm.collective_rpc(e2e_worker.time_steps, args=(False,))[0]
    return steps


def decode(llm: Any, prompts: Prompts, batch: int, context: int, steps: int) -> dict[str, Any]:
    """A step that decodes one token for each of `batch` requests."""
    # While the last prompts are read the first requests decode already, and so end sooner.
    tokens = WARM_STEPS + steps + batch * context // 1024 + 8
    timings = timed(llm, partial(generate, llm, prompts.draw(batch, context), tokens))
    times = [us for rows, us in timings if rows == batch]
    if len(times) < WARM_STEPS + steps:
        raise RuntimeError(f"only {len(times)} steps of {batch} rows for batch {batch}")
    reading = generate(llm, prompts.draw(batch, context), 1)
    wall = (generate(llm, prompts.draw(batch, context), 1 + steps) - reading) / steps * 1e6
    result = {"gpu_us": median(times[WARM_STEPS:]), "wall_us": wall if wall > 0 else None}
    llm.collective_rpc(e2e_worker.profile, args=(batch, WARM_STEPS, PROFILED_STEPS))
    generate(llm, prompts.draw(batch, context), tokens)
    split = llm.collective_rpc(e2e_worker.profiled)[0]
    return {**result, **(split or {})}


def prefill(llm: Any, prompts: Prompts, count: int, tokens: int) -> dict[str, float]:
    """Reading `count` prompts, until each has its first token."""

    def once() -> float:
        return read(llm, prompts.draw(count, tokens))

    seconds = [once() for _ in range(2 + PREFILLS)]
    gpu = [sum(us for _, us in timed(llm, once)) for _ in range(PREFILLS)]
    return {"wall_us": median(seconds[2:]) * 1e6, "gpu_us": median(gpu)}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
