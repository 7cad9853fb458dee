"""Serving end to end: ours and vLLM's own fp8 method, each in processes of its own.

The model is DeepSeek-V3.1 at its real width with few layers, the first one dense, from a
config.json without weights; e2e_worker.py fills both sides with the same random ones. Measured are

  start_cold    from the start of a process until it takes requests, with empty caches
  start_warm    the same with what the start before has left in them
  decode_step   GPU time of a step of `batch` rows; decode_part is what kernels of a kind have of it
  prefill       8 prompts of 2,048 tokens, until each has its first token
  serve         time to the first token and per token after it, as `vllm bench serve` sees them at
                `rates` requests a second

in one start after the other (e2e_engine.py; for serve e2e_serve.py). What a side has measured is
kept beside the results, so that its measurements can be divided over several calls.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import E2E_BENCHES, E2E_SIDES, BenchError, e2e_serve
from .e2e_process import started

CONFIG = Path(__file__).with_name("deepseek_v31.json")
OURS, PEER = E2E_SIDES
DEEP_GEMM_WARMUP = "VLLM_DEEP_GEMM_WARMUP"  # of vLLM, which by default compiles at the start
QUANTIZATION = dict(zip(E2E_SIDES, ("ue8m0", "fp8"), strict=True))
PREFILL, MAX_BATCHED_TOKENS, MAX_SEQS = (8, 2048), 8192, 256
Say = Callable[[str], None]
# Where the caches of a start are: Triton's, Inductor's, vLLM's, DeepGEMM's, FlashInfer's, CUDA's.
_CACHES = (
    "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "DG_JIT_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH", "TILELANG_CACHE_DIR", "XDG_CACHE_HOME",
)  # fmt: skip
# What vLLM and we log of a start, 0.26 to 0.33.
_PHASES = {
    "loading": r"Model loading took .* and ([\d.]+) seconds",
    "of it our warm-up": r"warm-up: every kernel is ready, ([\d.]+) s",
    "torch.compile": r"torch\.compile took ([\d.]+) s in total",
    "graph capture": r"Graph capturing finished in ([\d.]+) secs",
    "engine, with the last two": r"init engine \(.*\) took ([\d.]+) s",
}


@dataclass(frozen=True)
class Setup:
    """What both sides run.

    model: a directory with a config.json, None for DeepSeek-V3.1. routing: "uniform_random" or
    "router". engine: arguments for vLLM besides. serve: tokens of a prompt and of its answer, sent
    for `serve_seconds` at each of the rates.
    """

    model: str | None = None
    layers: int = 5
    tp: int = 1
    routing: str = "uniform_random"
    batches: tuple[int, ...] = (1, 16, 64, 256)
    context: int = 256
    steps: int = 50
    prefill: tuple[int, int] = PREFILL
    serve: tuple[int, int] = (1024, 128)
    rates: tuple[float, ...] = (2.0, 32.0)
    serve_seconds: float = 20.0
    engine: tuple[tuple[str, Any], ...] = ()

    def config(self) -> dict[str, Any]:
        """config.json of the model; BenchError if there is none."""
        path = CONFIG if self.model is None else Path(self.model, "config.json")
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"--model: {path} cannot be read: {error}") from error
        dense = min(1, config.get("first_k_dense_replace", 1))
        return {**config, "num_hidden_layers": self.layers, "first_k_dense_replace": dense}

    def vllm_arguments(self, side: str, model: str) -> dict[str, Any]:
        prompts, tokens = self.prefill
        return {
            "model": model,
            "quantization": QUANTIZATION[side],
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "tensor_parallel_size": self.tp,
            "max_num_seqs": max(MAX_SEQS, *self.batches, prompts),
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "max_model_len": max(tokens, self.context + 2 * self.steps + 256, sum(self.serve)) + 64,
            "enable_prefix_caching": False,
            **dict(self.engine),
        }


Results = dict[str, dict[str, Any]]


def measure(
    setup: Setup, only: Sequence[str], sides: Sequence[str], out: str | None,
    caches: str | None, say: Say,
) -> Results:  # fmt: skip
    """Measure `only` (all if empty) on `sides`; these results and those kept beside `out`.

    caches: a directory for the sides' caches, kept; start_warm alone needs what is there.
    """
    wanted: Sequence[str] = only or E2E_BENCHES
    paths = {side: None if out is None else Path(f"{out}.{side}.json") for side in QUANTIZATION}
    results: Results = {side: _kept(path, setup) for side, path in paths.items()}
    for side, path in paths.items():
        if side in sides:
            for result in _side(setup, side, wanted, caches, say):
                results[side] |= result
                if path is not None:
                    path.write_text(json.dumps({"setup": _plain(setup), "results": results[side]}))
    for side, path in paths.items():
        if side not in sides:  # the other call's, which may have measured meanwhile
            results[side] = _kept(path, setup)
    return {side: found for side, found in results.items() if found}


def _plain(setup: Setup) -> Any:
    """Without what calls may divide; as JSON has it."""
    return json.loads(json.dumps(asdict(replace(setup, batches=(), rates=()))))


def _kept(path: Path | None, setup: Setup) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["setup"] != _plain(setup):
        raise BenchError(
            f"{path} has results of another setup, {content['setup']}; this is {_plain(setup)}. "
            "Remove it, or write elsewhere with --out"
        )
    results: dict[str, Any] = content["results"]
    return results


def _side(
    setup: Setup, side: str, wanted: Sequence[str], caches: str | None, say: Say
) -> Iterator[dict[str, Any]]:
    """Results by "bench" or "bench batch", after each start."""
    with tempfile.TemporaryDirectory(prefix="vllm-ue8m0-e2e-") as folder:
        where = Path(caches or folder, side).absolute()
        filled = where.exists() and any(where.iterdir())
        if "start_cold" in wanted and filled:
            raise BenchError(f"--caches: {where} is not empty, so no start is cold; remove it")
        if "start_warm" in wanted and "start_cold" not in wanted and not filled:
            raise BenchError(
                "start_warm needs caches: measure start_cold too, or give --caches of a run of it"
            )
        if side == PEER and os.environ.get(DEEP_GEMM_WARMUP, "").lower() == "skip":
            say(f"{side}: {DEEP_GEMM_WARMUP}=skip: it starts sooner and compiles while it serves")
        own = bool({"start_cold", "start_warm"} & {*wanted}) or caches is not None
        starts = [bench for bench in ("start_cold", "start_warm") if bench in wanted]
        if not starts and _names(wanted):
            starts = [""]
        for start in starts:
            others = wanted if start == starts[-1] else ()
            say(f"{side}: {' and '.join(filter(None, (start, *_names(others))))}")
            for result in _run(setup, side, others, where if own else None, Path(folder), say):
                every = {k: v for k, v in result.items() if k not in ("decode", "prefill")}
                found = {start: every} if start else {}
                if "prefill" in result:
                    found["prefill"] = every | result["prefill"]
                for batch, one in result.get("decode", {}).items():
                    found[f"decode_step {batch}"] = every | one
                yield found
        if "serve" in wanted:
            say(f"{side}: serve, {', '.join(f'{rate:g}' for rate in setup.rates)} requests/s")
            yield from _serve(setup, side, where if own else None, Path(folder))


def _names(wanted: Sequence[str]) -> list[str]:
    """What is measured in a start, besides the start."""
    return [bench for bench in wanted if bench in ("prefill", "decode_step")]


def _serve(setup: Setup, side: str, caches: Path | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Results by "serve rate", in one start."""
    engine = setup.vllm_arguments(side, str(_model(setup, folder)))
    env, loads = _environment(setup, caches), [(rate, setup.serve_seconds) for rate in setup.rates]
    vocabulary = setup.config()["vocab_size"]
    measured = e2e_serve.measure(engine, vocabulary, env, setup.serve, loads)
    try:
        for rate, result in zip(setup.rates, measured, strict=True):
            yield {f"serve {rate:g}": result}
    except BenchError as error:
        raise BenchError(f"{side}: {error}") from error


def _model(setup: Setup, folder: Path) -> Path:
    """The model's directory, without weights."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(setup.config()))
    return model


def _run(
    setup: Setup, side: str, wanted: Sequence[str], caches: Path | None, folder: Path, say: Say
) -> Iterator[dict[str, Any]]:
    """One process; what it measured, with the phases of its start.

    Also what it had measured when this one was stopped (Ctrl+C, SIGTERM), before that goes on.
    """
    model = _model(setup, folder)
    out, error, job_file = (folder / name for name in ("out.json", "error", "job.json"))
    out.unlink(missing_ok=True)
    job = {
        "engine": setup.vllm_arguments(side, str(model)),
        "begun": time.time(),
        "vocabulary": setup.config()["vocab_size"],
        "decode": list(setup.batches) if "decode_step" in wanted else [],
        "context": setup.context,
        "steps": setup.steps,
        "prefill": setup.prefill if "prefill" in wanted else None,
        "out": str(out),
        "error": str(error),
    }
    job_file.write_text(json.dumps(job))
    command = [sys.executable, "-m", f"{__package__}.e2e_engine", str(job_file)]
    phases: dict[str, float] = {}
    try:
        status = _relay(command, _environment(setup, caches), phases)
    except BaseException:
        if out.exists():
            yield json.loads(out.read_text()) | {"phases": phases}
        raise
    if not out.exists():
        reason = error.read_text() if error.exists() else f"it ended with status {status}"
        raise BenchError(f"{side}: vLLM did not start: {reason}; see above")
    result: dict[str, Any] = json.loads(out.read_text())
    missing = [bench for bench in _names(wanted) if bench.partition("_")[0] not in result]
    if missing:
        say(f"{side}: no result of {', '.join(missing)}: the process ended with status {status}")
    yield {**result, "phases": phases}


def _environment(setup: Setup, caches: Path | None) -> dict[str, str]:
    env = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HF_HUB_OFFLINE": "1"}
    env["VLLM_NO_USAGE_STATS"] = "1"
    env.pop("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", None)
    if setup.routing != "router":
        env["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = setup.routing
    if caches is not None:
        for name in _CACHES:
            path = caches / name.lower()
            path.mkdir(parents=True, exist_ok=True)
            env[name] = str(path)
    return env


def _relay(command: Sequence[str], env: dict[str, str], phases: dict[str, float]) -> int:
    """Run, repeat what it prints on stderr; exit status. Into `phases` seconds that it logs."""
    with started(
        command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            sys.stderr.flush()
            for name, pattern in _PHASES.items():
                match = re.search(pattern, line)
                if match:
                    phases[name] = max(phases.get(name, 0.0), float(match[1]))
        return process.wait()
