"""Warm-up: launch every kernel that a server may launch, before it serves.

A kernel is compiled for its configuration and for what Triton knows of its arguments: which
integers are 1 or multiples of 16. Both follow from the layer, and of what changes while serving
from the number of rows alone. A backend's `linear_plan` and `experts_plan` give the configurations
for a number of rows, by the rules that launch; `representatives` tries all numbers that can matter
and keeps the least of each plan and remainder of 16, which is what strides are made of.

Few of these need kernels that none before them needs, which Triton tells without launching any
(kernels/precompile.py). They are launched for real, so that kernels are loaded too: vLLM's JIT
monitor counts a kernel that comes from Triton's cache on disk while serving as it does one that is
compiled. When the first one has to be compiled, all are, in a process for each core.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from . import dispatch
from .kernels.hopper_config import MAX_DECODE_ROWS

SPECIALIZED = 16  # Triton asks of integers whether this divides them
DENSE_ROWS, TILE_ROWS = 1024, 128
MOST_PROCESSES = 16
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
    activated: bool = False,
) -> Operator | None:  # fmt: skip
    """`linear` of a layer with activations of `dtype`, and of codes that a norm before it writes,
    or, if `activated`, silu_mul; None where nothing is compiled.
    """
    backend = _compiling("linear", w.device)
    if backend is None:
        return None

    def rows(M: int) -> torch.Tensor:
        return torch.zeros(M, w.shape[1], dtype=dtype, device=w.device)

    def launch(M: int) -> None:
        x, weight = rows(M), torch.zeros(w.shape[1], dtype=dtype, device=w.device)
        layer = w, sf, c, bias, gran, activation_scale
        backend.linear(x, *layer)
        backend.norm_linear(x, weight, 1e-6, None, False, *layer)
        if activated:
            backend.silu_mul_linear(torch.cat((x, x), 1), *layer)

    plan = backend.linear_plan(rows(1), w, sf, gran, activation_scale)
    key = "linear", dtype, *map(_kind, (w, sf, c, bias)), tuple(gran), activation_scale, activated
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


def absorbed(dtype: torch.dtype, H: int, P: int, R: int, L: int, V: int) -> Operator | None:
    """MLA's absorbed products: of queries [M, H, P + R], without the last R columns, to a latent of
    L, and from that to values [M, H, V]; None where they are the library's."""
    backend = _compiling("linear", torch.device("cuda"))
    if not hasattr(backend, "bmm"):
        return None

    def launch(M: int) -> None:
        options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
        queries, latent = torch.zeros(M, H, P + R, **options), torch.zeros(M, H, L, **options)
        w = torch.zeros(H, L, P, **options).mT
        backend.bmm(queries[..., :P].transpose(0, 1), w, latent.transpose(0, 1))
        w, values = torch.zeros(H, V, L, **options).mT, torch.zeros(M, H, V, **options)
        backend.bmm(latent.transpose(0, 1), w, values.transpose(0, 1))

    return Operator(("absorbed", dtype, H, P, R, L, V), backend.bmm_plan, launch, MAX_DECODE_ROWS)


def gate(
    dtype: torch.dtype, logits: Callable[[int], torch.dtype], E: int, K: int
) -> Operator | None:
    """Routed experts' gate [E, K], to `logits` of so many rows; None where it is vLLM's."""
    backend = _compiling("linear", torch.device("cuda"))
    if not hasattr(backend, "gate"):
        return None

    def plan(M: int) -> Hashable:
        return backend.bmm_plan(M), logits(M)

    def launch(M: int) -> None:
        x, w = (torch.zeros(rows, K, dtype=dtype, device="cuda") for rows in (M, E))
        backend.gate(x, w, logits(M))

    key = "gate", dtype, *map(logits, (1, MAX_DECODE_ROWS)), E, K
    return Operator(key, plan, launch, MAX_DECODE_ROWS)


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


def run(operators: Sequence[Operator], say: Say, processes: int | None = None) -> int:
    """Launch every kernel of these operators; how many there are that were not loaded.

    `say` gets a line before, every few seconds, and after. Where memory runs out, it gets a
    warning: the kernel is compiled when a step first needs it. Other errors are raised.
    """
    from .kernels import precompile

    started = time.monotonic()
    distinct: dict[Hashable, Operator] = {}
    for operator in operators:
        known = distinct.setdefault(operator.key, operator)
        if known.most < operator.most:
            distinct[operator.key] = operator
    if not distinct:
        return 0
    needed: list[tuple[Operator, int]] = []
    with precompile.recording() as kernels:
        for operator in distinct.values():
            for M in itertools.chain(*operator.representatives().values()):
                before = len(kernels)
                _launch(operator, M, say)
                if len(kernels) > before:
                    needed.append((operator, M))
    say(f"warm-up: {len(kernels)} kernels for {len(distinct)} layer shapes")
    progress, processes = _Progress(len(needed), "launches", say), processes or _processes()
    with precompile.compilations() as compiled:
        for operator, M in needed:
            _launch(operator, M, say)
            if compiled and processes > 1:
                _compile(kernels, processes, say)
                processes = 1
            progress.step()
    torch.cuda.synchronize()
    say(f"warm-up: every kernel is ready, {time.monotonic() - started:.1f} s")
    return len(kernels)


def _compile(kernels: list[Any], processes: int, say: Say) -> None:
    """Kernels that were recorded, into Triton's cache on disk."""
    from .kernels import precompile

    # Ranks beside this one compile the same kernels: each begins elsewhere, and finds on disk what
    # the others have done.
    begin = torch.cuda.current_device() * len(kernels) // _ranks()
    say(f"warm-up: {len(kernels)} kernels are compiled, in {processes} processes")
    progress = _Progress(len(kernels), "kernels", say)
    major, minor = torch.cuda.get_device_capability()
    ordered = kernels[begin:] + kernels[:begin]
    for line in precompile.precompile(ordered, 10 * major + minor, processes, progress.step):
        say(f"warm-up: not compiled ahead: {line}")


def _processes() -> int:
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // _ranks())


def _ranks() -> int:
    """Processes that may warm up on this machine: one for each GPU."""
    return max(1, torch.cuda.device_count())


def _launch(operator: Operator, M: int, say: Say) -> None:
    try:
        operator.launch(M)
    except torch.OutOfMemoryError:
        say(f"warm-up: no memory for {M} rows; their kernels are compiled when first needed")


class _Progress:
    """Steps from any thread; a line every few seconds."""

    def __init__(self, total: int, unit: str, say: Say) -> None:
        self._total, self._unit, self._say = total, unit, say
        self._done, self._last, self._lock = 0, time.monotonic(), Lock()

    def step(self) -> None:
        with self._lock:
            self._done += 1
            due = time.monotonic() - self._last >= SAY_SECONDS
            if due:
                self._last = time.monotonic()
                self._say(f"warm-up: {self._done} of {self._total} {self._unit}")
