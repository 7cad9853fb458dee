"""Damage checkpoints at random and read them: nothing but CheckpointError may come out.

python tests/checkpoint/fuzz_headers.py 5000000 [SEED]

A case is a function of (seed, number), so a failure names what repeats it. Most cases damage the
header of one file; the others damage the index or config.json, and then `inspect` and `load` read
what was accepted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from vllm_ue8m0.checkpoint.inspect import inspect
from vllm_ue8m0.checkpoint.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    open_checkpoint,
    read_header,
)

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F8_E4M3", "shape": [130, 3], "data_offsets": [0, 390]},
    "a.weight_scale_inv": {"dtype": "F32", "shape": [2, 1], "data_offsets": [392, 400]},
    "b.norm": {"dtype": "U8", "shape": [2], "data_offsets": [390, 392]},
    "c": {"dtype": "BF16", "shape": [], "data_offsets": [400, 402]},
    "d": {"dtype": "F16", "shape": [0, 7], "data_offsets": [402, 402]},
}
DATA = bytes([1]) * 390 + bytes(2) + (b"\0\0\x80\x3f" * 2) + bytes(2)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"],
    },
}
INDEX = {"metadata": {}, "weight_map": dict.fromkeys(list(HEADER)[1:], SINGLE_NAME)}
# What breaks readers: edges of integer types, other types, other names, ways out of the directory.
VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 127, 128, 2**31, 2**32, 2**47, 2**53, 2**60, 2**63, 2**64, 10**30, 10**400,
    1.5, 1e308, float("inf"), float("nan"), True, False, None, "", "x", "F8_E4M3", "F32", "F4",
    "F6_E2M3", "I8", "C64", "BOOL", "../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "\0", "\ud800",
    "n" * 300, SINGLE_NAME, INDEX_NAME, [], {}, [[]], [0], [2**47] * 30, [0, 390], "__metadata__",
    "a.weight", "a.scale", "fp8", "ue8m0", "deepseek_v32", "error", ["a"], [1], [128, 128], [0, 0],
)  # fmt: skip
BYTES = b'0123456789{}[]",:\\ab-e.u\x00\x80\xff'


def main(count: int, seed: int = 0) -> Counter[str]:
    """Run cases seed:0 ... seed:count-1; returns how they ended.

    Raises AssertionError, naming the case, for anything but CheckpointError.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with open(directory / SINGLE_NAME, "w+b", buffering=0) as file:
            for number in range(count):
                try:
                    outcomes[_case(random.Random(f"{seed}:{number}"), directory, file)] += 1
                except CheckpointError:
                    outcomes["refused"] += 1
                except Exception as error:
                    raise AssertionError(f"case {number} of seed {seed}: {error!r}") from error
    return outcomes


def _case(chance: random.Random, directory: Path, file: Any) -> str:
    kind = chance.random()
    if kind < 0.9:
        _put(file, _file(chance))
        return f"header of {len(read_header(directory / SINGLE_NAME))}"
    content, config, index = _whole(HEADER), json.dumps(CONFIG), ""
    if kind < 0.94:
        config = _text(chance, CONFIG)
    elif kind < 0.98:
        index = _text(chance, INDEX)
    else:
        content = _file(chance)
    _put(file, content)
    (directory / "config.json").write_bytes(config.encode(errors="surrogatepass"))
    (directory / INDEX_NAME).unlink(missing_ok=True)
    if index:
        (directory / INDEX_NAME).write_bytes(index.encode(errors="surrogatepass"))
    checkpoint = open_checkpoint(directory)
    for name in checkpoint.tensors:
        try:
            checkpoint.load(name)
        except CheckpointError:  # F4 has no torch type
            continue
    return f"servable {inspect(directory).servable}"


def _put(file: Any, content: bytes) -> None:
    os.ftruncate(file.fileno(), len(content))
    os.pwrite(file.fileno(), content, 0)


def _whole(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + DATA


def _file(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.55:
        return _whole(_text(chance, HEADER).encode(errors="surrogatepass"))
    if kind < 0.65:  # the length alone
        near = len(json.dumps(HEADER)) + chance.randint(-9, 9)
        return _whole(HEADER, chance.choice((near, 0, 1, 8, 10**8, 2**31, 2**60, 2**63, 2**64 - 1)))
    content = bytearray(_whole(HEADER))
    if kind < 0.75:
        del content[chance.randrange(len(content)) :]
        return bytes(content)
    for _ in range(chance.randint(1, 4)):  # raw bytes, most of them in the header
        position = chance.randrange(len(content) - (len(DATA) if chance.random() < 0.9 else 0))
        way = chance.randrange(4)
        if way == 0:
            content[position] ^= 1 << chance.randrange(8)
        elif way == 1:
            content[position] = chance.choice(BYTES)
        elif way == 2:
            content.insert(position, chance.choice(BYTES))
        else:
            del content[position : position + chance.randint(1, 9)]
    return bytes(content)


def _text(chance: random.Random, source: dict[str, Any]) -> str:
    """JSON with one to three edits of its structure, at times with a key given twice."""
    value = json.loads(json.dumps(source))
    for _ in range(chance.randint(1, 3)):
        chance.choice(EDITS)(chance, value)
    text = json.dumps(value)
    if chance.random() < 0.1:
        first = next(iter(source))
        text = f"{text[:-1]}, {json.dumps(first)}: {json.dumps(source[first])}}}"
    if chance.random() < 0.05:
        text = text.replace("0", "9" * chance.choice((20, 400, 5000)), 1)
    if chance.random() < 0.02:
        text = text[:-1] + ', "deep": ' + "[" * 5000 + "]" * 5000 + "}"
    return text


def _inside(chance: random.Random, value: Any) -> Any:
    """Some container in the structure."""
    while chance.random() < 0.75:
        children = value.values() if isinstance(value, dict) else value
        containers = [child for child in children if isinstance(child, (dict, list)) and child]
        if not containers:
            break
        value = chance.choice(containers)
    return value


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _replace(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    if container:
        container[chance.choice(_keys(container))] = deepcopy(chance.choice(VALUES))


def _nudge(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    numbers = [key for key in _keys(container) if type(container[key]) is int]
    if numbers:
        container[chance.choice(numbers)] += chance.choice((-128, -2, -1, 1, 2, 128, 2**40))


def _remove(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    if container:
        del container[chance.choice(_keys(container))]


def _add(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    if isinstance(container, list):
        container.append(deepcopy(chance.choice(VALUES)))
    else:
        name = chance.choice([v for v in VALUES if isinstance(v, str)])
        container[name] = deepcopy(chance.choice(VALUES))


def _rename(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    if isinstance(container, dict) and container:
        name = chance.choice([v for v in VALUES if isinstance(v, str)])
        container[name] = container.pop(chance.choice(list(container)))


def _swap(chance: random.Random, value: Any) -> None:
    container = _inside(chance, value)
    if len(container) > 1:
        one, two = chance.sample(_keys(container), 2)
        container[one], container[two] = container[two], container[one]


EDITS: tuple[Callable[[random.Random, Any], None], ...] = (
    _replace, _replace, _nudge, _nudge, _remove, _add, _rename, _swap,
)  # fmt: skip


if __name__ == "__main__":
    cases, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start = time.monotonic()
    for outcome, times in sorted(main(cases, chosen).items()):
        print(f"{times:9}  {outcome}")
    print(f"{cases} cases in {time.monotonic() - start:.0f} s")
