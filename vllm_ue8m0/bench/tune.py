"""`vllm-ue8m0 tune`: the fastest configurations of the sm_90 products, for hopper_config's tables.

Every candidate is checked before it is timed, as in `bench gemm`. Few rows, up to GRAPH_ROWS, are
timed in a graph over weights that are not in L2, more by single launches. SPLITS of few rows is
one number for a weight: the one with the best mean of all rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import torch

from .. import reference
from ..kernels.hopper_config import (
    DecodeConfig,
    default_decode,
    default_prefill,
    default_splits,
    prefill_splits,
    worth_fusing,
)
from ..layouts import to_layout
from . import BenchError, candidates, gate
from .candidates import Config, Point, Say
from .case import Inputs, Outputs
from .gemm import GRAN, Shape
from .machine import Machine
from .operands import activations, weight
from .timing import MIN_CALLS, Clock, Timing, plan_copies

ROUNDS = 8
GRAPH_ROWS = 256
# Outputs of this many candidates live at the same time, beside their weights.
MOST_CANDIDATES = 40
Times: TypeAlias = Mapping[Config, float]
Entry: TypeAlias = dict[str, Any]


def tune(
    shapes: Sequence[Shape], clock: Clock, sms: int, say: Say, workers: int | None = None,
    device: str = "cuda",
) -> Iterator[tuple[Shape, Entry]]:  # fmt: skip
    """Each shape (N, K) and its entry of the table, as soon as it is known.

    workers: processes that compile. BenchError names a configuration that is wrong or fails.
    """
    for N, K in shapes:
        if K % 16:
            raise BenchError(f"{N},{K}: the sm_90 kernels want K to be a multiple of 16")
    every = [point for shape in shapes for point in candidates.points(*shape)]
    refused = candidates.compile_all(candidates.jobs(every, sms), workers, say)
    for number, (N, K) in enumerate(shapes, 1):
        say(f"[{number}/{len(shapes)}] {N},{K}")
        generator = torch.Generator(device).manual_seed(crc32(f"{N},{K}".encode()))
        points, times = candidates.points(N, K), {}
        try:
            weights = _weights(generator, N, K, clock)
            for point in points:
                configs = [
                    config
                    for config in candidates.configs(point, sms)
                    if candidates.Job(point, config).kernel() not in refused
                ]
                if not configs:
                    raise BenchError(f"{point}: no configuration fits this GPU")
                times[point] = measure(point, configs, weights, generator, clock)
                say(_summary(point, times[point], sms))
        except torch.OutOfMemoryError as error:
            raise BenchError(f"{N},{K}: out of memory. Is the GPU in use?") from error
        yield (N, K), entry(times)


def _weights(generator: torch.Generator, N: int, K: int, clock: Clock) -> list[Inputs]:
    """As many copies of a weight as the L2 cache does not hold."""
    num_bytes = N * K
    footprint = num_bytes + MOST_CANDIDATES * 2 * GRAPH_ROWS * N
    copies, _ = plan_copies(num_bytes, footprint, clock.l2_bytes, clock.free_bytes())
    device = str(generator.device)
    drawn = (weight(generator, N, K, "ue8m0") for _ in range(copies))
    return [{"w": w, "sf": sf, "counters": candidates.counters(N, device)} for w, sf in drawn]


def measure(
    point: Point, configs: Sequence[Config], weights: Sequence[Inputs],
    generator: torch.Generator, clock: Clock,
) -> dict[Config, float]:  # fmt: skip
    """Microseconds of each configuration, whose results are right."""
    single = point.M > GRAPH_ROWS
    clock.free_bytes()  # gives back what the last graphs held
    buffers = [
        {**one, **_activations(generator, point)} for one in (weights[:1] if single else weights)
    ]
    sample = gate.sample_rows((gate.rows_of(point.M),), ("x", "a", "a_s"), ("product",))
    expected = _expected(sample.inputs(buffers[0]))
    for config in configs:
        failed = f"{point}: {config}"
        try:
            outputs = candidates.product(config, buffers[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise BenchError(f"{failed}: {error}") from error
        wrong = gate.check_product(lambda _: expected, sample, buffers[0], outputs)
        if wrong:
            raise BenchError(f"{failed}: wrong result: {wrong}")
    calls = {str(config): partial(_call, config, buffers) for config in configs}
    if single:
        timings = clock.measure_single(calls)
    else:
        timings = clock.measure(calls, len(buffers), max(len(buffers), MIN_CALLS))
    times = {}
    for config in configs:
        timing = timings[str(config)]
        if not isinstance(timing, Timing):
            raise BenchError(f"{point}: {config} cannot be timed: {timing}") from timing
        times[config] = timing.time_us
    return times


def _activations(generator: torch.Generator, point: Point) -> Inputs:
    x = activations(generator, point.M, point.K)
    if point.op == "linear":
        return {"x": x}
    a, a_s = reference.act_quant(x, ue8m0=True)
    return {"a": a, "a_s": to_layout(a_s, candidates.SCALE_LAYOUT)}


def _expected(inputs: Inputs) -> Outputs:
    if "x" in inputs:
        a, a_s = reference.act_quant(inputs["x"], ue8m0=True)
    else:
        a, a_s = inputs["a"], inputs["a_s"]
    w, sf = inputs["w"], inputs["sf"]
    return [reference.gemm(a, a_s, w, sf, None, None, GRAN, torch.float32)]


def _call(config: Config, buffers: Sequence[Inputs], index: int) -> Outputs:
    return candidates.product(config, buffers[index])


def default(point: Point, sms: int) -> Config:
    """What runs without a table."""
    M, N, K = point.M, point.N, point.K
    if point.op == "prefill":
        return default_prefill(M, N, K, prefill_splits(M, N, K, sms), sms)
    splits = default_splits(N, K, sms)
    fused = point.op == "linear" and worth_fusing(M, K, splits)
    return default_decode(M, N, K, splits, fused, sms)


def _summary(point: Point, times: Times, sms: int) -> str:
    best = min(times, key=lambda config: times[config])
    usual = times.get(default(point, sms))
    beside = "" if usual is None else f", {usual:.2f} us without a table"
    return f"  {point.op} M={point.M}: {times[best]:.2f} us of {len(times)}, {best}{beside}"


def choose_splits(times: Mapping[Point, Times]) -> int:
    """The parts of K for decode's points: the least geometric mean of time over the best time.

    Only what every point was measured with; equal ones: the fewest.
    """
    losses: dict[int, list[float]] = {}
    for measured in times.values():
        best: dict[int, float] = {}
        for config, time_us in measured.items():
            best[config.splits] = min(time_us, best.get(config.splits, time_us))
        for splits, time_us in best.items():
            losses.setdefault(splits, []).append(log(time_us / min(best.values())))
    means = {s: exp(sum(x) / len(x)) for s, x in losses.items() if len(x) == len(times)}
    return min(sorted(means), key=lambda splits: means[splits])


def entry(times: Mapping[Point, Times]) -> Entry:
    """What a table says of one weight, as hopper_config reads it."""
    decode: Entry = {"splits": choose_splits({p: t for p, t in times.items() if p.op != "prefill"})}
    found: Entry = {"decode": decode, "prefill": {}}
    for point, measured in times.items():
        if point.op == "prefill":
            best = min(measured, key=lambda config: measured[config])
            found["prefill"][str(point.M)] = asdict(best)
            continue
        having = {c: t for c, t in measured.items() if c.splits == decode["splits"]}
        best = min(having, key=lambda config: having[config])
        assert isinstance(best, DecodeConfig)
        chosen = {k: v for k, v in asdict(best).items() if k not in ("tokens", "splits")}
        decode.setdefault(point.op, {})[str(point.M)] = chosen
    return found


def read(path: Path, gpu: str) -> dict[str, Entry]:
    """The entries of a table by "N,K"; none if there is no file. BenchError for another GPU's."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        of, shapes = content["gpu"], dict(content["shapes"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is not a table of configurations: {error!r}") from error
    if of != gpu:
        raise BenchError(f"{path} is the table of {of}, this GPU is {gpu}")
    return shapes


def write(path: Path, machine: Machine, shapes: Mapping[str, Entry]) -> None:
    """A table, one line for each shape; what was there stays until it is whole."""
    head = {"gpu": machine.gpu, "date": machine.date, "versions": machine.versions}
    lines = [f"{json.dumps(shape)}: {json.dumps(shapes[shape])}" for shape in shapes]
    text = f'{json.dumps(head)[:-1]}, "shapes": {{\n' + ",\n".join(lines) + "\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(text)
    os.replace(partial_file, path)
