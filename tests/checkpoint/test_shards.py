"""Reading safetensors: agreement with the safetensors library, and one error for what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tiny_checkpoints import same_bits, write_checkpoint, write_raw

from vllm_ue8m0.checkpoint.shards import (
    INDEX_NAME,
    CheckpointError,
    open_checkpoint,
    read_header,
)

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int64, torch.bool,
)  # fmt: skip
SHAPES = ((), (0,), (3,), (7, 5), (2, 3, 4), (4, 0))


def every_kind() -> dict[str, torch.Tensor]:
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
            tensors[f"{dtype}.{shape}"] = bits.view(dtype).view(shape)
    return tensors


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: object = (2,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_load_agrees_with_safetensors(tmp_path: Path) -> None:
    tensors = every_kind()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert same_bits(checkpoint.load(name), expected), name
        assert checkpoint.tensors[name].shape == tuple(expected.shape)


@pytest.mark.parametrize("rows", [(0, 3), (2, 7), (3, 3), (4, None), (5, 99)])
def test_load_rows(tmp_path: Path, rows: tuple[int, int | None]) -> None:
    w = torch.randn(7, 5).bfloat16()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"other": torch.ones(3), "w": w}))
    assert same_bits(checkpoint.load("w", *rows), w[rows[0] : rows[1]])


def test_headers_need_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"w": torch.ones(2, 2)})
    code = (
        "import sys; from vllm_ue8m0.checkpoint.shards import open_checkpoint; "
        f"open_checkpoint({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 100, -65, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    whole = save({"a": torch.ones(16), "b": torch.ones(2, 8)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|not a safe)"):
        read_header(path)


BROKEN = {
    "starts at byte": {"a": entry(), "b": entry(4, 12)},
    "leaves a hole": {"a": entry(), "b": entry(12, 20)},
    "bytes after the last tensor": {"a": entry()},
    "more elements than any file holds": {"a": entry(shape=[2**47] * 30)},
    "is truncated": {"a": entry(), "b": entry(8, 16), "c": entry(16, 24)},
    r"which is 12 bytes, but its data_offsets \[0, 8\] span 8": {"a": entry(shape=[3])},
    "known: F4": {"a": entry(dtype="F128")},
    "entry of a is malformed: .*-1": {"a": entry(shape=[-1, -2])},
    "entry of a is malformed: .*True": {"a": entry(shape=[2, True])},
    r"entry of a is malformed: .*2\.0": {"a": entry(shape=[2.0])},
    "entry of a is malformed: .*8, 0": {"a": {**entry(), "data_offsets": [0, 8, 0]}},
    "entry of a is malformed: .'shape'": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "entry of a is malformed: 3": {"a": 3},
    "span -8": {"a": entry(8, 0)},
    "__metadata__ must map": {"__metadata__": {"n": 1}, "a": entry(0, 16, shape=[4])},
    "does not start with": [1],
    "not valid JSON": b'{"a": }',
    "not valid JSON: 'utf-8'": b'{"\xff": 1}',
    "'a' occurs twice": b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2),
    "'dtype' occurs twice": b'{"a": {"dtype": "F32", "dtype": "F16"}}',
    "not valid JSON: .*recursion": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_header(tmp_path: Path, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", BROKEN[message], bytes(16))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_absurd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match="header length 4611686018427387904"):
        read_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4999\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


VALID = save({"a": torch.ones(3), "bb": torch.ones(2, 2).bfloat16(), "c": torch.ones(0)})
# Bytes that mean something in a header are worth more than random ones.
BYTES = st.one_of(st.sampled_from(list(b'0123456789{}[]",:ab-e.')), st.integers(0, 255))
EDITS = st.lists(
    st.tuples(st.sampled_from("rid"), st.integers(0, len(VALID) - 1), BYTES), min_size=1, max_size=3
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(EDITS)
def test_mutated_files(tmp_path: Path, edits: list[tuple[str, int, int]]) -> None:
    """Whatever is accepted reads as safetensors reads it, and what safetensors refuses is refused.

    The converse holds too, but for names given twice, of which safetensors takes the last.
    """
    data = bytearray(VALID)
    for kind, position, byte in edits:
        position = min(position, len(data))
        data[position : position + (kind != "i")] = b"" if kind == "d" else bytes([byte])
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        ours = {name: (t.dtype, list(t.shape)) for name, t in read_header(path).items()}
    except CheckpointError as error:
        ours, reason = None, str(error)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            theirs = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except SafetensorError:
        theirs = None
    assert ours == theirs or (ours is None and "occurs twice" in reason), edits


def two_shards(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "two", {"a": torch.ones(2)}, {"b": torch.zeros(3)})


def edit_index(directory: Path, **changes: object) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"] |= changes
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_index(tmp_path: Path) -> None:
    directory = two_shards(tmp_path)
    # vLLM reads the files of the index only, so others in the directory do not count.
    save_elsewhere = {"a": torch.ones(9)}
    (directory / "extra.safetensors").write_bytes(save(save_elsewhere))
    checkpoint = open_checkpoint(directory)
    assert {name: t.shape for name, t in checkpoint.tensors.items()} == {"a": (2,), "b": (3,)}
    assert checkpoint.config["hidden_size"] == 576


def test_missing_shard(tmp_path: Path) -> None:
    directory = two_shards(tmp_path)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002\S+ is missing; .* 1 te"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "file",
    ["../two/model-00001-of-00002.safetensors", "/etc/passwd", "a/b", "", ".", "..", "\0", 7],
)
def test_index_cannot_leave_the_directory(tmp_path: Path, file: object) -> None:
    directory = two_shards(tmp_path)
    edit_index(directory, a=file)
    with pytest.raises(CheckpointError, match=r"a is said to be in .*; allowed: a plain file name"):
        open_checkpoint(directory)


@pytest.mark.parametrize("file", ["n" * 300, "\ud800"])
def test_index_with_impossible_file_names(tmp_path: Path, file: str) -> None:
    directory = two_shards(tmp_path)
    edit_index(directory, a=file)
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(directory)


def test_messages_quote_a_line_of_the_header_at_most(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a" * 10_000: ["b" * 10_000]})
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.no_cover
def test_a_late_repetition_in_a_large_header_is_found_at_once(tmp_path: Path) -> None:
    names = [f"layer.{i}" for i in range(200_000)]
    text = ",".join(f'"{name}":0' for name in [*names, names[-1]])
    path = write_raw(tmp_path / "x.safetensors", f"{{{text}}}".encode())
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"'layer\.199999' occurs twice"):
        read_header(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("changes", [{"c": 1}, {"a": 2, "b": 1}])
def test_index_does_not_fit(tmp_path: Path, changes: dict[str, int]) -> None:
    directory = two_shards(tmp_path)
    shards = {name: f"model-0000{number}-of-00002.safetensors" for name, number in changes.items()}
    edit_index(directory, **shards)
    with pytest.raises(CheckpointError, match=r"puts [ac] in model-0000\d-of-00002\S+; it is not"):
        open_checkpoint(directory)


def test_name_in_two_shards(tmp_path: Path) -> None:
    for file in ("one.safetensors", "two.safetensors"):
        (tmp_path / file).write_bytes(save({"a": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"a is in two shards: one\.\w+ and two\."):
        open_checkpoint(tmp_path)


def test_loose_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(save({name: torch.ones(2)}))
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.config == {}


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff"])
@pytest.mark.parametrize("file", ["config.json", INDEX_NAME])
def test_broken_json_files(tmp_path: Path, file: str, text: str) -> None:
    directory = two_shards(tmp_path)
    (directory / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=file):
        open_checkpoint(directory)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(tmp_path / "absent")


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"w": torch.ones(64)}))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.load("w")
