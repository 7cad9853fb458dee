"""Write a checkpoint's files: safetensors shards piece by piece, JSON, each complete or absent.

Every file is written under a temporary name, flushed to disk and renamed, so a name that exists is
a file that is whole. The bytes depend on the contents alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

import torch

from .shards import DTYPE_BITS

TEMPORARY = ".tmp"
_FLUSH_BYTES = 1 << 26
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

    Threads may write at the same time. The file has its name once `finish` has returned.

    with ShardWriter(path, {"a": ("F32", (2, 3))}) as shard:
        shard.write("a", data, offset=0)
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.temporary = path, path.with_name(path.name + TEMPORARY)
        header, self.offsets, self.missing = _header(layout)
        self.data_start = len(header)
        self.lock = threading.Lock()
        self.unflushed = 0
        self.finished = False
        # A new file: one that is there already could be a link to another.
        self.temporary.unlink(missing_ok=True)
        self.file = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(header, 0)

    def write(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write a piece of a tensor at `offset` bytes from its beginning."""
        self._write(data, self.data_start + self.offsets[name] + offset)
        with self.lock:
            self.missing -= len(data)
            self.unflushed += len(data)
            flush = self.unflushed >= _FLUSH_BYTES
            self.unflushed -= _FLUSH_BYTES * flush
        if flush and hasattr(os, "posix_fadvise"):
            # Linux then begins to write to disk, instead of leaving it all to the last fsync: 15 %
            # of the time for a shard of 1 GB (2 cores, 2026-11-22).
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write(self, data: bytes | bytearray | memoryview, position: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self.file, rest, position)
            rest, position = rest[written:], position + written

    @property
    def is_open(self) -> bool:
        """Neither finished nor aborted."""
        return self.file >= 0

    def claim(self) -> bool:
        """True for one caller: the first that asks when nothing is missing; it has to finish."""
        with self.lock:
            claimed = self.missing == 0 and not self.finished
            self.finished |= claimed
        return claimed

    def finish(self) -> None:
        """Flush to disk and give the file its name."""
        assert self.missing == 0, f"{self.missing=} bytes of {self.path}"
        self.finished = True
        os.fsync(self.file)
        self._close()
        os.replace(self.temporary, self.path)
        sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove what is written; nothing happens to a file that has its name."""
        self._close()
        self.temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


def _header(layout: Layout) -> tuple[bytes, dict[str, int], int]:
    """The file up to its data, each tensor's offset in the data, and the size of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    # Wide dtypes first, as safetensors orders them: every tensor is aligned to its elements.
    for name in sorted(layout, key=lambda name: (-DTYPE_BITS[layout[name][0]], name)):
        dtype, shape = layout[name]
        end = position + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, position


def file_size(layout: Layout) -> int:
    """Size of the safetensors file that ShardWriter makes of a layout."""
    header, _, size = _header(layout)
    return len(header) + size


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, complete or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as original:
        write_file(path, lambda file: shutil.copyfileobj(original, file))


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by `write`, complete or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk: a rename before is then not undone by a crash."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Progress:
    """A line on stderr: share done, bytes per second, time left. Call it with (done, total).

    The first call says where the work begins: what was done before counts for the share, not for
    the rate.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.shown = stream or sys.stderr, 0.0
        self.begin: tuple[float, int] | None = None  # time and bytes of the first call

    def __call__(self, done: int, total: int) -> None:
        now, finished = time.monotonic(), done >= total
        if self.begin is None:
            self.begin = now, done
        start, resumed = self.begin
        # A log file gets a line every 10 seconds, a terminal ten updates per second.
        terminal = self.stream.isatty()
        if not finished and now - self.shown < (0.1 if terminal else 10.0):
            return
        self.shown = now
        share = done / max(total, 1)
        bar = "#" * int(share * 30)
        text = f"[{bar:30}] {share:4.0%}  {done / 1e9:.2f}/{total / 1e9:.2f} GB"
        if done > resumed:
            rate = (done - resumed) / max(now - start, 1e-6)
            left = int((total - done) / rate)
            text += f"  {rate / 1e6:.0f} MB/s  {left // 60}:{left % 60:02d} left"
        self.stream.write(f"\r{text}" if terminal else f"{text}\n")
        if finished and terminal:
            self.stream.write("\n")
        self.stream.flush()
