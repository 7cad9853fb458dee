"""What `tune` may choose from: configurations of the sm_90 products, and running one of them.

Compilers take nearly all of tuning's time, so every kernel is compiled first, in processes side by
side that fill Triton's cache on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeAlias

import torch

from ..formats import BLOCK, SF_FLOOR
from ..kernels.hopper_config import (
    DecodeConfig,
    PrefillConfig,
    decode_candidates,
    device_of,
    prefill_candidates,
    prefill_cost_us,
    prefill_splits,
    splits_candidates,
)
from ..layouts import ceil_div, to_layout
from . import BenchError
from .case import Inputs, Outputs

Config: TypeAlias = DecodeConfig | PrefillConfig
Say: TypeAlias = Callable[[str], None]

ROWS = {
    "gemm": (1, 16, 32, 64),
    "linear": (1, 8, 16, 32, 64),
    "prefill": (128, 256, 512, 1024, 2048, 8192),
}
SCALE_LAYOUT = "mn_major"  # what the kernels read without a conversion
HOPELESS = 2.0  # prefill candidates that should take longer than the best by this
MAX_WORKERS = 16  # each has a context on the GPU


@dataclass(frozen=True)
class Point:
    """What a configuration is chosen for.

    op: "gemm" and "linear" (from bf16) of few rows, "prefill" of more.
    """

    op: str
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.op} M={self.M} N={self.N} K={self.K}"


def points(N: int, K: int) -> list[Point]:
    """Everything that is tuned for a weight."""
    return [Point(op, M, N, K) for op, rows in ROWS.items() for M in rows]


def configs(point: Point, sms: int) -> list[Config]:
    """The candidates of a point, those of all splits."""
    M, N, K = point.M, point.N, point.K
    if point.op == "prefill":
        choices = prefill_candidates(M, N, K, prefill_splits(M, N, K, sms))
        costs = {c: prefill_cost_us(c, M, N, K, sms) for c in choices}
        return [c for c, cost in costs.items() if cost <= HOPELESS * min(costs.values())]
    linear = point.op == "linear"
    return [
        config
        for splits in splits_candidates(N, K, sms)
        for config in decode_candidates(M, N, K, splits, linear, sms)
    ]


def counters(N: int, device: str) -> torch.Tensor:
    """Zeros, enough for any candidate of a weight of N rows: prefill splits under 280 tiles."""
    return torch.zeros(max(ceil_div(N, 64), 2 * 280), dtype=torch.int32, device=device)


def product(config: Config, inputs: Inputs) -> Outputs:
    """inputs: w, sf, counters, and x, or a and a_s -> [M, N] bf16 of this configuration."""
    from .. import portable  # Triton's kernels: not without a GPU
    from ..kernels import decode_gemm, prefill_gemm

    w, sf = inputs["w"], inputs["sf"]
    counts = inputs["counters"] if config.splits > 1 else None
    a, a_s = inputs.get("a"), inputs.get("a_s")
    if a is None:
        a = inputs["x"]
        if not (isinstance(config, DecodeConfig) and config.fused):
            a, a_s = portable.act_quant(a, BLOCK, True, layout=SCALE_LAYOUT)
    out = torch.empty(a.shape[0], w.shape[0], dtype=torch.bfloat16, device=w.device)
    if isinstance(config, DecodeConfig):
        decode_gemm.launch(a, a_s, w, sf, None, None, out, config, counts, True, SF_FLOOR)
    else:
        assert a_s is not None
        _, sms = device_of(w.device.index or 0)
        prefill_gemm.launch(a, a_s, w, sf, None, None, out, config, counts, sms)
    return [out]


@dataclass(frozen=True)
class Job:
    """A candidate that some process compiles by running it once."""

    point: Point
    config: Config

    def __str__(self) -> str:
        return f"{self.point}: {self.config}"

    def size(self) -> int:
        return self.point.N * (self.point.K + self.point.M) + self.point.M * self.point.K

    def kernel(self) -> tuple[object, ...]:
        """Equal for jobs that need the same compiled kernel, as far as its arguments tell."""
        N, NK = self.point.N, ceil_div(self.point.K, BLOCK)
        arguments = N % 16 == 0, NK % 16 == 0, NK == 1
        config = self.config
        if isinstance(config, PrefillConfig):
            return config, N % 8 == 0, *arguments
        tiles, groups = ceil_div(N, config.block_n), config.programs // config.splits
        steps = ceil_div(tiles, groups) * ceil_div(ceil_div(NK, 2), config.splits)
        return replace(config, programs=0), config.blocks(NK), steps > config.stages, *arguments


def jobs(points: Iterable[Point], sms: int) -> list[Job]:
    """One job for every kernel that the candidates of these points need, of the smallest size."""
    found: dict[tuple[object, ...], Job] = {}
    every = [Job(point, config) for point in points for config in configs(point, sms)]
    for job in sorted(every, key=Job.size):
        found.setdefault(job.kernel(), job)
    return list(found.values())


def run_once(job: Job) -> tuple[str, str] | None:
    """In a process of its own: None, or the kind of the error and its first line."""
    try:
        M, N, K = job.point.M, job.point.N, job.point.K
        NK = ceil_div(K, BLOCK)

        def codes(*shape: int) -> torch.Tensor:
            zeros = torch.zeros(shape, dtype=torch.uint8, device="cuda")
            return zeros.view(torch.float8_e4m3fn)

        def scales(*shape: int) -> torch.Tensor:
            return torch.full(shape, 127, dtype=torch.uint8, device="cuda")

        inputs = {"w": codes(N, K), "sf": scales(ceil_div(N, BLOCK), NK)}
        inputs["counters"] = counters(N, "cuda")
        if job.point.op == "linear":
            inputs["x"] = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
        else:
            inputs |= {"a": codes(M, K), "a_s": to_layout(scales(M, NK), SCALE_LAYOUT)}
        product(job.config, inputs)
        torch.cuda.synchronize()
    except Exception as error:  # some errors of compilers cannot be sent to another process
        return type(error).__name__, (str(error).strip() or "no message").splitlines()[0]
    return None


def compile_all(jobs: Sequence[Job], workers: int | None, say: Say) -> set[tuple[object, ...]]:
    """Compile and run every job once; the kernels that need more than this GPU's SMs have.

    BenchError names a configuration with any other error.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), MAX_WORKERS, len(jobs))
    say(f"compiling {len(jobs)} kernels in {workers} processes")
    refused = set()
    # A forked process cannot use CUDA.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(run_once, job): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                found = future.result()
            except BrokenProcessPool as error:
                raise BenchError(f"{job}, or one beside it: a compiling process died") from error
            if found is not None and found[0] != "OutOfResources":
                raise BenchError(f"{job}: {found[0]}: {found[1]}")
            if found is not None:
                refused.add(job.kernel())
                say(f"left out: {job}: {found[1]}")
            if number % 50 == 0 or number == len(jobs):
                say(f"compiled {number} of {len(jobs)}")
    finally:
        pool.shutdown(cancel_futures=True)
    return refused
