"""Files that hold what a model predicted: read back whole, or refused by name."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from recordings import made_up, recording

from vllm_ue8m0.evaluate import EvalError
from vllm_ue8m0.evaluate.recording import read, write


@pytest.fixture
def made():
    windows, logits, _ = made_up(1, (5, 2, 9))
    return recording(logits, windows, 4, [0, 0, 1])


def test_round_trip(made, tmp_path):
    write(tmp_path / "a.npz", made)
    found = read(tmp_path / "a.npz")
    assert found.meta == made.meta
    for field in fields(made)[1:]:
        expected = getattr(made, field.name)
        assert getattr(found, field.name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(found, field.name), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_windows_and_rows(made):
    windows = made.windows()
    assert [len(window) for window in windows] == [5, 2, 9]
    assert windows[0] + windows[1] + windows[2] == made.tokens.tolist()
    assert made.targets().tolist() == windows[0][1:] + windows[1][1:] + windows[2][1:]
    assert made.window_of_rows().tolist() == [0] * 4 + [1] + [2] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_ids": np.zeros((13, 4), np.int64)}, "damaged (top_ids)"),
        ({"actual": np.zeros((13, 1), np.float32)}, "damaged (actual)"),
        ({"actual": np.zeros(12, np.float32)}, "sizes disagree"),
        ({"lengths": np.array([5, 1, 10], np.int32)}, "sizes disagree"),
        ({"lengths": np.array([5, 2, 8], np.int32)}, "sizes disagree"),
        ({"files": np.array([0, 0, 2], np.int32)}, "sizes disagree"),
        ({"files": np.array([0, 0], np.int32)}, "sizes disagree"),
        ({"meta": {"format": 2}}, "format 2; this version reads 1"),
    ],
)
def test_damage_is_named(made, tmp_path, change, words):
    write(tmp_path / "a.npz", replace(made, **change))
    with pytest.raises(EvalError) as error:
        read(tmp_path / "a.npz")
    assert words in str(error.value) and "a.npz" in str(error.value)


@pytest.mark.parametrize("contents", [b"", b"text", b"PK\x03\x04 a broken archive"])
def test_other_files_are_no_recordings(tmp_path, contents):
    (tmp_path / "a").write_bytes(contents)
    with pytest.raises(EvalError, match=r"not a recording .*--out RECORDING.npz` writes one"):
        read(tmp_path / "a")


def test_other_archives_are_no_recordings(made, tmp_path):
    np.savez(tmp_path / "a.npz", tokens=made.tokens)
    with pytest.raises(EvalError, match="not a recording"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", meta=np.array(json.dumps(made.meta), dtype=object))
    with pytest.raises(EvalError, match="not a recording"):  # nothing is unpickled
        read(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", made.tokens)
    with pytest.raises(EvalError, match="not a recording"):
        read(tmp_path / "c.npy")


def test_directory_and_missing_file(tmp_path):
    with pytest.raises(EvalError, match="a directory, not a recording"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.npz")
