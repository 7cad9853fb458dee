"""From cases to records: check our result, find which peers are there, time all side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import mean
from zlib import crc32

import torch

from . import BenchError, limit
from .case import Agree, Case, Inputs, Operator, Outputs, Shared, Work, tensor_bytes
from .machine import Machine
from .records import Record
from .roof import Roof
from .table import EMPTY
from .timing import Candidate, Clock, Timing, plan_copies

# Up to this many rows a launch, not the work, may decide the time: "empty" is measured beside it.
SMALL_M = 128
MAX_SPREAD = 0.15

Say = Callable[[str], None]


def run(
    cases: Sequence[Case], clock: Clock, machine: Machine, say: Say, device: str = "cuda",
    roof: Roof | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Measure cases one by one; BenchError names the case whose result of ours is wrong.

    roof: the limit of cases that have flops. `say` gets a line per case, one per peer that is
    absent and why, and warnings.
    """
    said: set[str] = set()
    kept = _Kept(device)

    def say_once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case}")
        try:
            times, work = _measure(case, kept.of(case.shared), clock, device, say_once)
        except torch.OutOfMemoryError as error:
            raise BenchError(f"{case}: {_first_line(error)} Is the GPU in use?") from error
        for name, timing in times.items():
            if timing.spread > MAX_SPREAD and not name.startswith("copy"):  # the fastest counts
                say(f"warning: {case}: {name}: rounds differ by {timing.spread:.0%} of the median")
        yield _record(case, machine, times, work, roof)


class _Kept:
    """The shared inputs of the last case, for the next one."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._name: str | None = None
        self._inputs: Inputs = {}

    def of(self, shared: Shared | None) -> Inputs:
        name = None if shared is None else shared.name
        if name != self._name:
            self._name, self._inputs = None, {}  # two sets need not fit into memory
            if shared is not None:
                self._inputs = shared.draw(_seeded(shared.name, self._device))
            self._name = name
        return self._inputs


def _seeded(text: str, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(crc32(text.encode()))


def _measure(
    case: Case, shared: Inputs, clock: Clock, device: str, say: Say
) -> tuple[dict[str, Timing], Work]:
    """Times by candidate: "ours", "peer NAME", "context NAME", "copy ...", "context empty"."""
    generator = _seeded(str(case), device)
    free_bytes = clock.free_bytes()
    own = case.inputs(generator)
    inputs = {**shared, **own}
    outputs = case.ours(inputs)
    wrong = case.check(inputs, outputs)
    if wrong:
        raise BenchError(
            f"{case}: wrong result of {case.implementation}: {wrong}. It was not timed; "
            "`python -m pytest tests/kernels` on this machine says more"
        )
    operators: dict[str, Operator] = {"ours": case.ours}
    for kind, others in (("peer", case.peers), ("context", case.context)):
        for name, operator in others.items():
            agree = case.agree_with.get(name, case.agree) if kind == "peer" else None
            # On a copy: vLLM's norms write to their inputs.
            copy = {key: tensor.clone() for key, tensor in own.items()}
            reason = _why_absent(operator, agree, {**shared, **copy}, outputs)
            if reason:
                say(f"{kind} {name} of {case.bench} is absent: {reason}")
            else:
                operators[f"{kind} {name}"] = operator

    copies, calls = 1, 1
    footprint = tensor_bytes(own) + case.num_bytes + tensor_bytes(outputs) * len(operators)
    if not case.single:
        l2_bytes, least = clock.l2_bytes, case.min_copies
        copies, calls = plan_copies(case.num_bytes, footprint, l2_bytes, free_bytes, least)
    del outputs
    buffers = [inputs, *({**shared, **case.inputs(generator)} for _ in range(copies - 1))]
    candidates: dict[str, Candidate] = {
        name: partial(_call, operator, buffers) for name, operator in operators.items()
    }
    if case.flops is None:
        candidates.update(_yardsticks(case, candidates, copies, device))
    if case.single:
        timings = clock.measure_single(candidates)
    else:
        timings = clock.measure(candidates, copies, calls)
    times = {}
    for name, timing in timings.items():
        if isinstance(timing, Timing):
            times[name] = timing
        elif name.startswith(("peer", "context")):
            where = "not timed" if case.single else "not in a CUDA graph"
            say(f"{name} of {case.bench} is absent: {where}: {_first_line(timing)}")
        else:
            raise BenchError(f"{case}: {name} cannot be timed: {_first_line(timing)}") from timing
    return times, _work(case, buffers, calls)


def _work(case: Case, buffers: Sequence[Inputs], calls: int) -> Work:
    """What a call does, in the mean of all that were timed."""
    if case.work is None:
        return Work(case.num_bytes, case.flops)
    each = [case.work(inputs) for inputs in buffers]
    made = [each[i % len(each)] for i in range(calls)]
    flops = None if case.flops is None else round(mean(work.flops or 0 for work in made))
    return Work(round(mean(work.num_bytes for work in made)), flops)


def _yardsticks(
    case: Case, candidates: Mapping[str, Candidate], copies: int, device: str
) -> dict[str, Candidate]:
    """What stands beside work that is limited by bytes: copies, and for few rows empty kernels."""
    found = limit.copies(case.num_bytes, copies, device)
    if case.M is not None and case.M <= SMALL_M:
        # Back to back, a kernel under programmatic dependent launch starts while its own kind
        # ends. After an ordinary kernel it cannot: both figures are told.
        empty = limit.empty(device)
        for name, call in candidates.items():
            if not name.startswith("context"):
                after = partial(_in_turn, empty, call)
                found[f"context {EMPTY} + {name.removeprefix('peer ')}"] = after
        found[f"context {EMPTY}"] = empty
    return found


def _call(operator: Operator, buffers: list[Inputs], index: int) -> Outputs:
    return operator(buffers[index])


def _in_turn(first: Candidate, second: Candidate, index: int) -> object:
    first(index)
    return second(index)


def _why_absent(
    operator: Operator, agree: Agree | None, inputs: Inputs, outputs: Outputs
) -> str | None:
    """Why another implementation is not measured, or None; a peer has to agree with our outputs."""
    try:
        theirs = operator(inputs)
        different = agree(outputs, theirs) if agree else None
        if inputs and next(iter(inputs.values())).is_cuda:
            torch.cuda.synchronize()  # an error of a kernel shows here
    except Exception as error:
        return _first_line(error)
    return different and f"not the same work: {different}"


def _record(
    case: Case, machine: Machine, times: dict[str, Timing], work: Work, roof: Roof | None
) -> Record:
    by_kind: dict[str, dict[str, float]] = {"peer": {}, "context": {}, "copy": {}}
    for key, timing in times.items():
        kind, _, name = key.partition(" ")
        if kind in by_kind:
            by_kind[kind][name] = round(timing.time_us, 3)
    limit_us = min(by_kind["copy"].values(), default=None)
    if work.flops is not None and roof is not None:
        limit_us = round(roof.time_us(work.num_bytes, work.flops), 3)
    return Record(
        bench=case.bench,
        M=case.M,
        N=case.N,
        K=case.K,
        ours_us=round(times["ours"].time_us, 3),
        peers_us=by_kind["peer"],
        limit_us=limit_us,
        context_us=by_kind["context"],
        num_bytes=work.num_bytes,
        ours=case.implementation,
        gpu=machine.gpu,
        versions=dict(machine.versions),
        date=machine.date,
        variant=dict(case.variant),
        flops=work.flops,
        roof=None if roof is None or work.flops is None else asdict(roof),
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
