"""Convert a checkpoint directory between bf16, block FP8 with UE8M0 scales and with float32 scales.

The output is planned from the source's headers and scales, then written in pieces by several
workers; peak memory does not depend on the model's size, and the bytes depend on the source and
the options alone. An interrupted conversion is continued by the same call (destination.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .destination import Destination, check_apart, fingerprint
from .plan import (
    DEFAULT_IGNORE,
    QUANT_METHODS,
    TARGETS,
    Options,
    new_config,
    other_files,
    plan,
    split,
)
from .shards import SINGLE_NAME, CheckpointError, open_checkpoint
from .steps import Copy, Piece, Requantize, Step, output_bytes, source_bytes
from .workers import Task, choose_workers, run_tasks
from .writer import Layout, ShardWriter, file_size

__all__ = ["DEFAULT_IGNORE", "QUANT_METHODS", "TARGETS", "Summary", "convert"]
# Header entry, step, output layout: 950 bytes for each tensor of 90,000, names of 50 characters.
_PLAN_BYTES = 2000


class Summary(NamedTuple):
    """What `convert` did.

    converted, copied          tensors
    bytes_read, bytes_written  bytes of tensors, those of an interrupted run before included
    errors                     weight -> ||new - old|| / ||old||, of requantized weights
    """

    converted: int
    copied: int
    bytes_read: int
    bytes_written: int
    errors: dict[str, float]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "ue8m0",
    scale_dtype: str = "float32",
    quant_method: str = "fp8",
    ignore: Iterable[str] = DEFAULT_IGNORE,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    requantize: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
) -> Summary:
    """Convert the checkpoint in `src` into the directory `dst`: new, empty, or interrupted.

    to            "ue8m0": quantize the 2-D float weights of linear layers; or, from block FP8
                  whose scales are 2^k or c * 2^k, keep every number. "bf16": dequantize block
                  FP8. "fp32-scales": block FP8 with scales amax / 448, or with those it has
    scale_dtype   how scales are stored: "float32" (readable everywhere), "uint8", "float8_e8m0fnu"
                  (2^k only)
    quant_method  "fp8", or "ue8m0", which vLLM then serves with this plugin without a flag
    ignore        patterns (fnmatch) of module names whose weights are not quantized
    requantize    round weights a second time where scales cannot be kept, instead of refusing
    progress      called with (bytes done, bytes in all), first with what an earlier run has done
    workers       threads; by default one per core. Fewer if max_memory does not hold as many
    max_memory    bytes that the process may grow by; 2 GiB by default

    Raises CheckpointError (source or destination not usable, NaN or Inf in a weight), ConfigError
    (the source's quantization is of another kind), ValueError (arguments): nothing is left in
    `dst` then. After OSError, an interrupt or a kill, the same call continues where it stopped.
    """
    options = Options(to, scale_dtype, quant_method, requantize, tuple(ignore), max_shard_bytes)
    source, target = open_checkpoint(src), Path(dst)
    steps = plan(source, options)
    config = new_config(source, steps, options)
    shards = _named(split(steps, max_shard_bytes))
    others = other_files(Path(src))
    check_apart(Path(src), target)
    read = {*others, *(Path(src) / Path(info.file).name for info in source.tensors.values())}
    read.add(Path(src) / "config.json")
    destination = Destination(target, fingerprint(Path(src), sorted(read), options.as_dict()))
    size = output_bytes(steps)
    destination.check_space(size + sum(file.stat().st_size for file in others))
    piece = max(step.memory for step in steps)
    threads = choose_workers(workers, max_memory, len(source.tensors) * _PLAN_BYTES, piece)

    destination.open()
    try:
        _write(destination, shards, threads, progress)
        layouts = {file: _layout(part) for file, part in shards.items()}
        destination.publish(
            {name: file for file, layout in layouts.items() for name in layout},
            size,
            {file.relative_to(src): file for file in others},
            config,
        )
    except CheckpointError:
        # The source is at fault; what was made of it is of no use to anyone.
        destination.discard()
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}. What is finished is kept: the same command continues",
            str(error.filename or target),
        ) from error
    finally:
        destination.close()
    copied = sum(isinstance(step, Copy) for step in steps)
    return Summary(len(steps) - copied, copied, source_bytes(steps), size, destination.errors)


def _named(shards: list[list[Step]]) -> dict[str, list[Step]]:
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": steps for i, steps in enumerate(shards, 1)}


def _layout(steps: list[Step]) -> Layout:
    return {name: tensor for step in steps for name, tensor in step.layout.items()}


def _write(
    destination: Destination,
    shards: dict[str, list[Step]],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the shards that are not there yet."""
    there = {f for f, steps in shards.items() if destination.has(f, file_size(_layout(steps)))}
    total = sum(source_bytes(steps) for steps in shards.values())
    done = sum(source_bytes(shards[file]) for file in there)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    report(0)
    writers: list[ShardWriter] = []
    missing = {file: steps for file, steps in shards.items() if file not in there}
    try:
        run_tasks(_tasks(destination, missing, writers), workers, report)
    finally:
        for writer in writers:
            writer.abort()


def _tasks(
    destination: Destination, shards: dict[str, list[Step]], writers: list[ShardWriter]
) -> Iterator[Task]:
    """Every piece of every shard, in order; the last one done finishes its shard."""
    for file, steps in shards.items():
        writer = ShardWriter(destination.staging / file, _layout(steps))
        writers[:] = [w for w in writers if w.is_open] + [writer]
        finish = partial(_finish, destination, writer, steps)
        finish()  # a shard of empty tensors has no piece
        for step in steps:
            for piece in step.pieces():
                yield partial(_run, writer, piece, finish)


def _run(writer: ShardWriter, piece: Piece, finish: Callable[[], None]) -> int:
    count = piece(writer)
    finish()
    return count


def _finish(destination: Destination, writer: ShardWriter, steps: list[Step]) -> None:
    if writer.claim():
        errors = {s.name: s.relative_error for s in steps if isinstance(s, Requantize)}
        destination.record(errors)
        writer.finish()
