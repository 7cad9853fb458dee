"""Write a checkpoint's files: safetensors shards piece by piece, JSON, each complete or absent.

Every file is written under a temporary name, flushed to disk and renamed, so a name that exists is
a file that is whole. The bytes depend on the contents alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

import torch

from .shards import DTYPE_BITS

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a safetensors file."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits // 8


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, row-major, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class ShardWriter:
    """A safetensors file whose tensors are known beforehand and arrive in any order, in pieces.

    with ShardWriter(path, {"a": ("F32", (2, 3))}) as shard:
        shard.write("a", data, offset=0)
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.offsets: dict[str, int] = {}
        position = 0
        # Wide dtypes first, as safetensors orders them: every tensor is aligned to its elements.
        for name in sorted(layout, key=lambda name: (-DTYPE_BITS[layout[name][0]], name)):
            dtype, shape = layout[name]
            end = position + num_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            self.offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.missing = position
        self.data_start = 8 + len(text)
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed in __exit__
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write a piece of a tensor at `offset` bytes from its beginning."""
        self.file.seek(self.data_start + self.offsets[name] + offset)
        self.file.write(data)
        self.missing -= len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self.file:
            if kind is None:
                assert self.missing == 0, f"{self.missing=} bytes of {self.path}"
                _sync(self.file)
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        _sync(file)
    os.replace(temporary, path)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


class Progress:
    """A line on stderr: share done, bytes per second, time left. Call it with (done, total)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.start, self.shown = stream or sys.stderr, time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now, finished = time.monotonic(), done >= total
        # A log file gets a line every 10 seconds, a terminal ten updates per second.
        terminal = self.stream.isatty()
        if not finished and now - self.shown < (0.1 if terminal else 10.0):
            return
        self.shown = now
        rate = done / max(now - self.start, 1e-6)
        left = (total - done) / max(rate, 1.0)
        share = done / max(total, 1)
        bar = "#" * int(share * 30)
        text = f"[{bar:30}] {share:4.0%}  {done / 1e9:.2f}/{total / 1e9:.2f} GB"
        text += f"  {rate / 1e6:.0f} MB/s  {int(left) // 60}:{int(left) % 60:02d} left"
        self.stream.write(f"\r{text}" if terminal else f"{text}\n")
        if finished and terminal:
            self.stream.write("\n")
        self.stream.flush()
