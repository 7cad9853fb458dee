"""What `bench e2e` does inside vLLM's workers, through `collective_rpc`; imports no vLLM.

Functions get the worker first. `watch` wraps a model runner, of either generation: a step is from
`execute_model` until its sampler has launched. A spinning kernel goes before each timed step, so
that the host has launched all of it when it starts, and the GPU's time is what is measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from . import e2e_split

CODE_STD = 100.0  # of e4m3 codes
WEIGHT_STD = 0.02  # of bf16 weights, as DeepSeek initializes them
SCALE_EXPONENT = -14  # of weights: their values are about CODE_STD * 2^-14 = 0.006
COVER_CYCLES = 20_000_000  # 10 ms at 2 GHz
# After a profiler has started, which the first rank alone does: the others wait for it.
SETTLING_STEPS = 3
CHUNK_ROWS = 4096


@torch.no_grad()
def fill(worker: Any) -> int:
    """Random weights, from the parameters' names alone: both sides get the same; how many.

    vLLM's dummy values, up to 1e-3, are all but zero as e4m3 (0.26).
    """
    model, done = worker.get_model(), 0
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device)
        generator.manual_seed(crc32(f"{worker.rank} {name}".encode()))
        done += _fill(name.rsplit(".", 1)[-1], name, parameter.data, generator)
    for name, module in model.named_modules():
        for made in ("W_UK_T", "W_UV"):  # MLA's, from kv_b_proj when that was loaded
            tensor = getattr(module, made, None)
            if isinstance(tensor, torch.Tensor):
                generator = torch.Generator(tensor.device)
                generator.manual_seed(crc32(f"{worker.rank} {name} {made}".encode()))
                tensor.normal_(std=WEIGHT_STD, generator=generator)
    return done


def _fill(last: str, name: str, data: torch.Tensor, generator: torch.Generator) -> bool:
    if last.endswith("scale_c"):
        return False
    if "scale" in last:
        byte = 127 + SCALE_EXPONENT
        if data.dtype in (torch.uint8, torch.float8_e8m0fnu):
            data.view(torch.uint8).fill_(byte)
        elif data.dtype == torch.int32:  # four bytes, DeepGEMM's on sm_100
            data.fill_(byte * 0x01010101)
        else:
            data.fill_(2.0**SCALE_EXPONENT)
    elif data.dtype == torch.float8_e4m3fn:
        for part in data.unbind() if data.dim() == 3 else data.split(CHUNK_ROWS):
            values = torch.randn(
                part.shape, dtype=torch.bfloat16, generator=generator, device=part.device
            )
            part.copy_(values.mul_(CODE_STD).clamp_(-448, 448).to(data.dtype))
    elif not data.is_floating_point():
        return False
    elif data.dim() == 1:
        data.fill_(1.0 if "norm" in name else 0.0)
    else:
        for part in data.split(CHUNK_ROWS):
            part.normal_(std=WEIGHT_STD, generator=generator)
    return True


class Extension:
    """For vLLM's `--worker-extension-cls`: what a server's workers can be asked to do by name."""

    def ue8m0_fill(self) -> int:
        return fill(self)

    def ue8m0_describe(self) -> dict[str, Any]:
        return describe(self)


class Watch:
    """Steps [rows, start, end] of a model runner; a profile of some of them."""

    def __init__(self) -> None:
        self.timing = False
        self.steps: list[list[Any]] = []
        self.profile_rows, self.skip, self.count, self.seen = 0, 0, 0, 0
        self.profiler: Any = None
        self.split: dict[str, Any] | None = None

    def begin(self, rows: int) -> None:
        if rows and rows == self.profile_rows:
            self._advance_profile()
        if self.timing and rows:
            if torch.cuda.is_available():
                torch.cuda._sleep(COVER_CYCLES)
            self.steps.append([rows, _mark(), None])

    def end(self) -> None:
        if self.steps and self.steps[-1][2] is None:
            self.steps[-1][2] = _mark()

    def _advance_profile(self) -> None:
        self.seen += 1
        step = self.seen - self.skip
        if step == 1:
            _synchronize()
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif step == SETTLING_STEPS + 1:
            with torch.profiler.record_function(e2e_split.SETTLED):
                pass
        elif step == SETTLING_STEPS + self.count + 1:
            _synchronize()
            self.profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json")
                self.profiler.export_chrome_trace(str(path))
                trace = json.loads(path.read_text(encoding="utf-8"))
            self.split, self.profiler = e2e_split.split(trace, self.count), None
            self.profile_rows = 0


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Sampler:
    """A runner's sampler, in a range of its name; the end of a step."""

    def __init__(self, sampler: Any, watch: Watch) -> None:
        self._sampler, self._watch = sampler, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(e2e_split.RANGE + e2e_split.SAMPLING):
            result = self._sampler(*args, **kwargs)
        self._watch.end()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def watch(worker: Any) -> None:
    """Put a Watch into the worker's model runner."""
    runner = worker.model_runner
    seen = runner.ue8m0_watch = Watch()
    execute, model = runner.execute_model, runner.model
    compute_logits = model.compute_logits

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        seen.begin(scheduled.total_num_scheduled_tokens)
        return execute(scheduled, *args, **kwargs)

    def logits(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(e2e_split.RANGE + e2e_split.LM_HEAD):
            return compute_logits(*args, **kwargs)

    runner.execute_model, model.compute_logits = execute_model, logits
    runner.sampler = _Sampler(runner.sampler, seen)


def time_steps(worker: Any, on: bool) -> list[tuple[int, float]]:
    """Start or stop timing; rows and us of the steps since the last call."""
    seen: Watch = worker.model_runner.ue8m0_watch
    _synchronize()
    steps, seen.steps, seen.timing = seen.steps, [], on
    return [(rows, _us(start, end)) for rows, start, end in steps if end is not None]


def _us(start: Any, end: Any) -> float:
    return float((end - start) * 1e6 if isinstance(start, float) else start.elapsed_time(end) * 1e3)


def profile(worker: Any, rows: int, skip: int, count: int) -> None:
    """Profile `count` steps of so many rows, after `skip` and SETTLING_STEPS of them."""
    seen: Watch = worker.model_runner.ue8m0_watch
    seen.profile_rows, seen.skip, seen.count, seen.seen, seen.split = rows, skip, count, 0, None


def profiled(worker: Any) -> dict[str, Any] | None:
    """e2e_split.split of the profiled steps; None if there were too few."""
    seen: Watch = worker.model_runner.ue8m0_watch
    return seen.split


def describe(worker: Any) -> dict[str, Any]:
    """The worker's device, and what it holds beside the KV cache, bytes."""
    if not torch.cuda.is_available():
        return {"gpu": "CPU", "memory": None}
    free, total = torch.cuda.mem_get_info()
    caches = _tensors(getattr(worker.model_runner, "kv_caches", []))
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in caches if t.numel()
    }
    name = torch.cuda.get_device_name()
    return {"gpu": name, "memory": total - free - sum(sizes.values())}


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found
    return [t for value in values for t in _tensors(value)]
