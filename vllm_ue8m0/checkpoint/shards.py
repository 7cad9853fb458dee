"""Read safetensors checkpoints: headers strictly and without torch, tensors one at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, and the data,
which the tensors cover without holes or overlaps up to the last byte of the file.
Everything wrong with a file is a CheckpointError that names it; OSError passes through.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What safetensors itself refuses to read; 163,000 tensors (DeepSeek-V3 with scales) in one file
# would need about 20 MB.
_MAX_HEADER = 100_000_000
_MAX_DIM = 1 << 48
_MAX_BITS = 1 << 62

DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the file or tensor and what to do."""


class TensorInfo(NamedTuple):
    """Where a tensor lies; start and end are byte offsets in the file, not in its data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor's header entry and config.json ({} if there is none)."""

    path: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read one tensor, or its rows start:stop along the first dimension, from its file."""
        import torch

        info = self.tensors[name]
        dtype = torch_dtype(name, info.dtype)
        offset, size, shape = 0, info.end - info.start, info.shape
        if start or stop is not None:
            first, last, _ = slice(start, stop).indices(shape[0])
            row = size // shape[0]
            offset, size, shape = first * row, (last - first) * row, (last - first, *shape[1:])
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(read_bytes(info, offset, size), dtype=dtype).view(shape)


@cache
def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16",
        "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16",
        "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }  # fmt: skip
    return {key: getattr(torch, value) for key, value in names.items()}


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """The torch dtype of a header's dtype; raises CheckpointError for the sub-byte ones."""
    if dtype not in _torch_dtypes():
        raise CheckpointError(f"{name}: dtype {dtype} has no torch type and cannot be loaded.")
    return _torch_dtypes()[dtype]


def read_bytes(info: TensorInfo, offset: int, size: int) -> bytearray:
    """`size` bytes of a tensor from `offset` on; raises CheckpointError if the file has shrunk."""
    data = bytearray(size)
    with open(info.file, "rb") as file:
        file.seek(info.start + offset)
        if file.readinto(data) != size:
            raise CheckpointError(f"{info.file}: the file became shorter while it was being read.")
    return data


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; reads none of its data."""
    path = os.fspath(path)
    with open(path, "rb") as file:
        header, data_start, file_size = _read_json(file, path)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(type(v) is str for v in entry.values()):
                raise CheckpointError(f"{path}: __metadata__ must map strings to strings.")
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            # bool is an int to isinstance, and JSON has both.
            numbers_ok = all(type(v) is int and 0 <= v < _MAX_DIM for v in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            numbers_ok = False
        if not numbers_ok or type(dtype) is not str:
            raise CheckpointError(
                f"{path}: the header's entry of {_clip(name)} is malformed: {_clip(repr(entry))}."
            )
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            raise CheckpointError(
                f"{path}: {_clip(name)} has dtype {_clip(repr(dtype))}; "
                f"known: {', '.join(DTYPE_BITS)}."
            )
        size = _num_bits(shape, bits)
        if size is None:
            raise CheckpointError(
                f"{path}: {_clip(name)} has shape {_clip(str(shape))}, more elements than any "
                "file holds. The header is damaged: fetch the file again."
            )
        if size != (end - begin) * 8:
            raise CheckpointError(
                f"{path}: {name} is {dtype} {list(shape)}, which is {size / 8:g} bytes, but its "
                f"data_offsets [{begin}, {end}] span {end - begin}."
            )
        tensors[name] = TensorInfo(dtype, shape, data_start + begin, data_start + end, path)
    _check_layout(tensors, path, data_start, file_size)
    return tensors


def _read_json(file: BinaryIO, path: str) -> tuple[dict[str, Any], int, int]:
    """The header as parsed, the offset of the data, the size of the file."""
    file_size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`.")
    length = int.from_bytes(prefix, "little")
    if file_size < 10 or length > _MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: {file_size} bytes, header length {length} "
            f"(allowed: at most {_MAX_HEADER})."
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"{path} is truncated: {file_size} bytes, but the header alone takes {8 + length}. "
            "Fetch the file again."
        )
    try:
        raw = file.read(length).decode()
        if not raw.startswith("{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}.") from None
    return header, 8 + length, file_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {_clip(repr(counts.most_common(1)[0][0]))} occurs twice")
    return result


def _num_bits(shape: tuple[int, ...], bits: int) -> int | None:
    """Size of a tensor; None beyond what a file can hold, found without multiplying on."""
    if 0 in shape:
        return 0
    for size in shape:
        bits *= size
        if bits > _MAX_BITS:
            return None
    return bits


def _clip(text: str) -> str:
    """No more of a header than fits into a message."""
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _check_layout(
    tensors: dict[str, TensorInfo], path: str, data_start: int, file_size: int
) -> None:
    position = data_start
    for start, end, name in sorted((t.start, t.end, name) for name, t in tensors.items()):
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole"
            raise CheckpointError(
                f"{path}: {name} {what} (starts at byte {start}, expected {position})."
            )
        position = end
    if position > file_size:
        raise CheckpointError(
            f"{path} is truncated: {file_size} bytes, but its header describes {position}. "
            "Fetch the file again."
        )
    if position < file_size:
        raise CheckpointError(
            f"{path}: {file_size - position} bytes after the last tensor; the header and the data "
            "do not belong together."
        )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read all headers of a checkpoint directory, and its config.json.

    The files are those of model.safetensors.index.json, else model.safetensors, else every
    *.safetensors. Raises CheckpointError for a missing shard, a name in two shards, or an index
    that does not fit them.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a checkpoint's directory.")
    listed: dict[str, str] = {}
    if (directory / INDEX_NAME).exists():
        listed = _read_index(directory / INDEX_NAME)
        files = sorted(set(listed.values()))
    elif (directory / SINGLE_NAME).exists():
        files = [SINGLE_NAME]
    else:
        files = sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors files.")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not _is_file(directory / file):
            count = sum(1 for shard in listed.values() if shard == file)
            raise CheckpointError(
                f"{directory}: shard {file} is missing; {INDEX_NAME} puts {count} tensors in it. "
                "Fetch the checkpoint again."
            )
        found = read_header(directory / file)
        for name in tensors.keys() & found.keys():
            raise CheckpointError(
                f"{name} is in two shards: {Path(tensors[name].file).name} and {file}. "
                "Remove the files that do not belong to this checkpoint."
            )
        tensors.update(found)
    for name, file in listed.items():
        if name not in tensors or Path(tensors[name].file).name != file:
            raise CheckpointError(f"{directory}: {INDEX_NAME} puts {name} in {file}; it is not.")
    return Checkpoint(str(directory), tensors, _read_object(directory / "config.json"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a lone surrogate
        return False


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no 'weight_map' object.")
    for name, file in weight_map.items():
        # An index comes with the download: it must not reach outside the directory.
        plain = isinstance(file, str) and os.path.basename(file) == file and "\0" not in file
        if not plain or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: {name} is said to be in {file!r}; allowed: a plain file name."
            )
    return weight_map


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must be a JSON object.")
    return value
