"""What `vllm-ue8m0 bench ...` and `tune` run: measure, show, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import BenchError, plot, records, table

if TYPE_CHECKING:  # showing what was recorded loads no torch
    from .case import Case


def quant(only: Sequence[str], quick: bool, out: str | None, picture: str | None) -> None:
    """Measure the quantizers on this machine's GPU."""
    from .quant import cases

    measure(lambda backend: cases(backend, only, quick), ("act_quant",), out, picture)


def gemm(
    only: Sequence[str],
    quick: bool,
    shapes: Sequence[tuple[int, int]],
    out: str | None,
    picture: str | None,
) -> None:
    """Measure the dense products on this machine's GPU; shapes (N, K): instead of the usual."""
    from .gemm import cases

    def selected(gemm_backend: ModuleType, linear_backend: ModuleType) -> Sequence[Case]:
        return cases(gemm_backend, linear_backend, only, quick, shapes)

    measure(selected, ("gemm", "linear"), out, picture, with_roof=True)


def moe(
    only: Sequence[str],
    quick: bool,
    tokens: Sequence[int],
    out: str | None,
    picture: str | None,
) -> None:
    """Measure the routed experts on this machine's GPU; tokens of a layer: instead of the usual."""
    from .moe import cases

    def selected(backend: ModuleType) -> Sequence[Case]:
        return cases(backend, only, quick, tokens)

    measure(selected, ("experts",), out, picture, with_roof=True)


def measure(
    cases: Callable[..., Sequence[Case]],
    operators: Sequence[str],
    out: str | None,
    picture: str | None,
    with_roof: bool = False,
) -> None:
    """Measure cases(backend of each operator on this GPU); print a table, write JSONL and a plot.

    with_roof: measure what bounds products first.
    """
    from .. import dispatch
    from . import machine, roof

    machine.require_gpu()
    if picture is not None:
        plot.check(picture)
    from .run import run  # Triton's kernels: not without a GPU
    from .timing import CudaClock

    try:
        backends = [dispatch.choose(op, "cuda").load() for op in operators]
    except (RuntimeError, ValueError) as error:
        raise BenchError(str(error)) from error
    measured: list[records.Record] = []

    def kept() -> Iterator[records.Record]:
        clock = CudaClock()
        bound = roof.measure(clock) if with_roof else None
        if bound is not None:
            _say(f"roof: reads {bound.tb_per_s} TB/s, FP8 products {bound.tflops} TFLOPS")
        for record in run(cases(*backends), clock, machine.describe(), _say, roof=bound):
            measured.append(record)
            yield record

    if out is None:
        list(kept())
    else:
        records.write(out, kept())
    print(table.render(measured))
    if picture is not None:
        plot.save(measured, picture)


def e2e(
    only: Sequence[str],
    sides: Sequence[str],
    out: str | None,
    caches: str | None,
    setup: dict[str, Any],
) -> None:
    """Serve on this machine's GPUs, ours and vLLM's fp8. setup: of e2e.Setup, None: its default."""
    from . import e2e, e2e_report, machine

    machine.require_gpu()
    chosen = e2e.Setup(**{name: value for name, value in setup.items() if value is not None})
    results = e2e.measure(chosen, only, sides or [*e2e.QUANTIZATION], out, caches, _say)
    measured = list(e2e_report.records(chosen, results))
    if out is not None and measured:
        records.write(out, measured)
    print(e2e_report.details(results))
    if measured:
        print(table.render(measured))


def tune(
    shapes: Sequence[tuple[int, int]], out: str | None, rounds: int | None, workers: int | None
) -> None:
    """Tune the sm_90 products for shapes (N, K), DeepSeek-V3's if none; write or amend a table."""
    from . import machine

    machine.require_gpu("use a table of its GPU")
    from .. import dispatch
    from ..kernels.hopper_config import device_of, table_path
    from . import tune
    from .gemm import SHAPES
    from .timing import CudaClock

    (sm90,) = (backend for backend in dispatch.BACKENDS if backend.name == "sm90")
    supported, reason = sm90.supports("gemm", "cuda", True)
    if not supported:
        raise BenchError(f"only the sm_90 products have tables: {reason}")
    here = machine.describe()
    read_from = table_path(here.gpu)
    path = read_from if out is None else Path(out)
    entries = tune.read(path, here.gpu)
    _, sms = device_of(0)
    clock = CudaClock(rounds or tune.ROUNDS)
    for (N, K), entry in tune.tune(shapes or SHAPES, clock, sms, _say, workers):
        entries[f"{N},{K}"] = entry
        tune.write(path, here, entries)
    print(f"{path}: {len(entries)} shapes")
    if path != read_from:
        print(f"It is read from {read_from}")


def show(path: str) -> None:
    """Print the table of a recorded file."""
    print(table.render(records.read(path)))


def draw(path: str, picture: str) -> None:
    """Plot a recorded file."""
    plot.save(records.read(path), picture)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
