"""One result, and files of results: a JSON object per line, the same keys for every benchmark.

  {"bench": "act_quant", "M": 8192, "N": null, "K": 7168, "ours_us": 64.5,
   "peers_us": {"vllm": 132.5}, "limit_us": 62.5, "context_us": {}, "num_bytes": 176619520,
   "ours": "portable kernels/act_quant.py", "gpu": "...", "versions": {"torch": "...", ...},
   "date": "YYYY-MM-DD", "flops": null, "roof": null, "scale": "ue8m0", "layout": "row_major"}

M, N, K       null where the operator has no such size; of moe_layer tokens, null, the hidden size
peers_us      other implementations of the same work; context_us: of other work
limit_us      a copy of num_bytes, half read and half written, or what the roof says; null: none
num_bytes     what the operator has to read and write; null if that says nothing
flops         2 M N K of a product, or of a layer's products together; null for what is limited by
              bytes alone. Both are a mean over calls where they depend on the routing
roof          of a product: {"tb_per_s": reads, "tflops": FP8 products} that this GPU reached in
              the same run; limit_us is the larger of num_bytes and flops over these
versions      of torch, triton, vllm, vllm_ue8m0, cuda, driver; null for what is absent
Files from before products were measured lack flops and roof. Any other key is a variant (scale,
layout, residual, ...): a string, a number or a flag.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

from . import BenchError

Variant: TypeAlias = dict[str, str | int | bool]


@dataclass(frozen=True)
class Record:
    bench: str
    M: int | None
    N: int | None
    K: int | None
    ours_us: float
    peers_us: dict[str, float]
    limit_us: float | None
    context_us: dict[str, float]
    num_bytes: int | None
    ours: str
    gpu: str
    versions: dict[str, str | None]
    date: str
    variant: Variant
    flops: int | None = None
    roof: dict[str, float] | None = None

    def to_json(self) -> str:
        """One line, without its end."""
        values = {name: getattr(self, name) for name in KEYS}
        return json.dumps({**values, **self.variant}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Parse one line; ValueError says what is wrong with it."""
        values = json.loads(line)  # its error is a ValueError
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, found {type(values).__name__}")
        missing = [key for key in REQUIRED if key not in values]
        if missing:
            raise ValueError(
                f"no {', '.join(map(repr, missing))}; a record has {', '.join(REQUIRED)}"
            )
        variant = {key: values.pop(key) for key in [*values] if key not in KEYS}
        for key, value in values.items():
            if not _VALID[key](value):
                raise ValueError(f"{key!r} is {value!r}; expected {_EXPECTED[key]}")
        for key, value in variant.items():
            if not isinstance(value, (str, int, bool)):
                raise ValueError(f"variant {key!r} is {value!r}; expected a string, number or flag")
        return cls(**values, variant=variant)


KEYS = tuple(field.name for field in fields(Record) if field.name != "variant")
REQUIRED = tuple(key for key in KEYS if key not in ("flops", "roof"))


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and value is not True and isfinite(value) and value > 0


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value is not True and value > 0)


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_time, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_SIZE = (_is_size, "a positive integer or null")
_TYPES = {
    "bench": (_is_text, "a string"),
    **dict.fromkeys(
        ("M", "N", "K", "num_bytes", "flops"), (_is_size, "a positive integer or null")
    ),
    "ours_us": (_is_time, "a positive number of microseconds"),
    "limit_us": (lambda v: v is None or _is_time(v), "a positive number of microseconds or null"),
    "peers_us": (_are_times, "an object of positive numbers of microseconds"),
    "context_us": (_are_times, "an object of positive numbers of microseconds"),
    "roof": (lambda v: v is None or _are_times(v), "an object of positive numbers or null"),
    **dict.fromkeys(("ours", "gpu", "date"), (_is_text, "a string")),
    "versions": (lambda v: isinstance(v, dict), "an object"),
}
_VALID = {key: valid for key, (valid, _) in _TYPES.items()}
_EXPECTED = {key: expected for key, (_, expected) in _TYPES.items()}


def describe_variant(variant: Variant) -> str:
    """A few words for people: flags by name, numbers as name=value, bf16 goes without saying."""
    words = []
    for name, value in variant.items():
        if value is True:
            words.append(name)
        elif isinstance(value, str) and (name, value) != ("dtype", "bf16"):
            words.append(value)
        elif not isinstance(value, (str, bool)):
            words.append(f"{name}={value}")
    return " ".join(words)


def read(path: str | Path) -> list[Record]:
    """Records of a file, empty lines skipped; BenchError names the line that is not one."""
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: not a text file, so not recorded results: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            raise BenchError(f"{path}:{number}: not a benchmark record: {error}") from error
    if not records:
        raise BenchError(f"{path}: no records in it; `bench ... --out FILE` writes them")
    return records


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write records to a new file, replacing an old one once all are there.

    Each is on disk, in PATH.partial, before the next is asked for: what an interrupted run
    measured is kept, and so is the file it was to replace.
    """
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_json() + "\n")
            file.flush()
    partial.replace(path)
