"""Warm-up: launch every kernel that a server may launch, before it serves.

A kernel is compiled for its configuration and for what Triton knows of its arguments: which
integers are 1 or multiples of 16. Both follow from the layer, and of what changes while serving
from the number of rows alone. A backend's `linear_plan` and `experts_plan` give the configurations
for a number of rows, by the rules that launch; `representatives` tries all numbers that can matter
and keeps the least of each plan and remainder of 16, which is what strides are made of.

These are launched for real, so that kernels are loaded too: vLLM's JIT monitor counts a kernel that
comes from Triton's cache on disk while serving as it does one that is compiled. New kernels are
compiled in threads: Triton 3.6's front end, about half of the time, holds the interpreter's lock,
but processes would each need a CUDA context beside the weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from . import dispatch

SPECIALIZED = 16  # Triton asks of integers whether this divides them
DENSE_ROWS, TILE_ROWS = 1024, 128
MOST_THREADS = 4
SAY_SECONDS = 5.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Operator:
    """An operator of a layer.

    key     equal for layers that launch the same kernels
    plan    configurations for a number of rows
    launch  runs it on so many rows of its own
    most    rows that a server may ask for
    """

    key: Hashable
    plan: Callable[[int], Hashable]
    launch: Callable[[int], None]
    most: int

    def representatives(self) -> dict[Hashable, list[int]]:
        """Rows by plan: a single one, and the least of each remainder of 16, in order."""
        found: dict[Hashable, dict[Hashable, int]] = {}
        for M in candidates(self.most):
            found.setdefault(self.plan(M), {}).setdefault((M == 1, M % SPECIALIZED), M)
        return {plan: list(rows.values()) for plan, rows in found.items()}


def candidates(most: int) -> Iterator[int]:
    """Numbers of rows among which is one of every plan and remainder.

    Above DENSE_ROWS plans change at whole tiles, or no more often than every TILE_ROWS rows.
    """
    yield from range(1, min(most, DENSE_ROWS) + 1)
    for start in range(DENSE_ROWS, most, TILE_ROWS):
        yield from range(start + 1, min(start + SPECIALIZED, most) + 1)


def linear(
    dtype: torch.dtype, w: torch.Tensor, sf: torch.Tensor, c: torch.Tensor | None,
    bias: torch.Tensor | None, gran: Sequence[int], activation_scale: str, most: int,
) -> Operator | None:  # fmt: skip
    """`linear` of a layer with activations of `dtype`; None where nothing is compiled."""
    backend = _compiling("linear", w.device)
    if backend is None:
        return None

    def rows(M: int) -> torch.Tensor:
        return torch.zeros(M, w.shape[1], dtype=dtype, device=w.device)

    def launch(M: int) -> None:
        backend.linear(rows(M), w, sf, c, bias, gran, activation_scale)

    plan = backend.linear_plan(rows(1), w, sf, gran, activation_scale)
    key = "linear", dtype, *map(_kind, (w, sf, c, bias)), tuple(gran), activation_scale
    return Operator(key, plan, launch, most)


def experts(
    dtype: torch.dtype, w13: torch.Tensor, sf13: torch.Tensor, c13: torch.Tensor | None,
    w2: torch.Tensor, sf2: torch.Tensor, c2: torch.Tensor | None, gran13: Sequence[int],
    gran2: Sequence[int], activation_scale: str, topk: int, ids: torch.dtype,
    expert_map: torch.Tensor | None, most: int,
) -> Operator | None:  # fmt: skip
    """`experts` of a layer, with topk_ids of dtype `ids`; None where nothing is compiled."""
    backend = _compiling("experts", w13.device)
    if backend is None:
        return None
    E, _, H = w13.shape
    num_global = E if expert_map is None else len(expert_map)
    device = w13.device

    def rows(M: int) -> torch.Tensor:
        return torch.zeros(M, H, dtype=dtype, device=device)

    def launch(M: int) -> None:
        slots = torch.arange(M * topk, device=device)
        weights = torch.ones(M, topk, dtype=torch.float32, device=device)
        backend.experts(
            rows(M), w13, sf13, c13, w2, sf2, c2, weights,
            (slots % num_global).to(ids).view(M, topk), gran13, gran2, activation_scale, False,
            expert_map,
        )  # fmt: skip

    plan = backend.experts_plan(
        rows(1), w13, sf13, w2, sf2, gran13, gran2, activation_scale, topk, num_global
    )
    tensors = map(_kind, (w13, sf13, c13, w2, sf2, c2, expert_map))
    key = "experts", dtype, *tensors, tuple(gran13), tuple(gran2), activation_scale, topk, ids
    return Operator(key, plan, launch, most)


def _compiling(op: str, device: torch.device) -> Any:
    """The backend of an operator if it has kernels to compile."""
    if device.type != "cuda":  # a layer that is offloaded, or Triton's interpreter
        return None
    backend = dispatch.choose(op, device.type).load()
    return backend if hasattr(backend, f"{op}_plan") else None


def _kind(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % SPECIALIZED


def run(operators: Sequence[Operator], say: Say, threads: int | None = None) -> int:
    """Launch every kernel of these operators; how many launches that took.

    `say` gets a line before, every few seconds, and after. Where memory runs out, it gets a
    warning: the kernel is compiled when a step first needs it. Other errors are raised.
    """
    started = time.monotonic()
    distinct: dict[Hashable, Operator] = {}
    for operator in operators:
        known = distinct.setdefault(operator.key, operator)
        if known.most < operator.most:
            distinct[operator.key] = operator
    rounds = _rounds(list(distinct.values()))
    total = sum(map(len, rounds))
    if not total:
        return 0
    say(f"warm-up: {total} launches for {len(distinct)} layer shapes; new kernels are compiled")
    progress, device, ranks = _Progress(total, say), torch.cuda.current_device(), _ranks()
    threads = threads or max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))
    torch.cuda.synchronize()  # threads have a stream of their own
    with ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for jobs in rounds[:-1]:
            # Ranks beside this one compile the same kernels: each begins elsewhere, and finds on
            # disk what the others have done.
            begin = device * len(jobs) // ranks
            futures = [
                pool.submit(_launch, operator, M, say)
                for operator, M in jobs[begin:] + jobs[:begin]
            ]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.step()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    for operator, M in rounds[-1]:
        _launch(operator, M, say)
        progress.step()
    torch.cuda.synchronize()
    say(f"warm-up: every kernel is ready, {time.monotonic() - started:.1f} s")
    return total


def _rounds(operators: Sequence[Operator]) -> list[list[tuple[Operator, int]]]:
    """Launches in order. Within each round but the last few need the same kernel: for threads.

    First one for each plan, which is often the same kernel in several layers; then the other
    layers', and the multiples of 16. Then all, with what only an unforeseen stride could make new:
    threads that use a kernel first may each begin a cache for it (JITFunction.device_caches, a
    defaultdict, as of Triton 3.9), and what went into all but one of them is not found any more.
    """
    first: dict[Hashable, tuple[Operator, int]] = {}
    second: list[tuple[Operator, int]] = []
    every: list[tuple[Operator, int]] = []
    for operator in operators:
        for plan, (least, *rest) in operator.representatives().items():
            if first.setdefault(plan, (operator, least)) != (operator, least):
                second.append((operator, least))
            second += [(operator, M) for M in rest if M % SPECIALIZED == 0]
            every += [(operator, M) for M in (least, *rest)]
    return [list(first.values()), second, every]


def _ranks() -> int:
    """Processes that may warm up on this machine: one for each GPU."""
    return torch.cuda.device_count()


def _launch(operator: Operator, M: int, say: Say) -> None:
    try:
        operator.launch(M)
    except torch.OutOfMemoryError:
        say(f"warm-up: no memory for {M} rows; their kernels are compiled when first needed")


class _Progress:
    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say, self._done, self._last = total, say, 0, time.monotonic()

    def step(self) -> None:
        self._done += 1
        if time.monotonic() - self._last >= SAY_SECONDS:
            self._last = time.monotonic()
            self._say(f"warm-up: {self._done} of {self._total} launches")
