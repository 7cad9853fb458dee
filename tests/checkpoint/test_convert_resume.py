"""Interrupted conversions: nothing to mistake for a checkpoint, and the same bytes when continued.

Runs that are to be killed are forked from this process, which has torch loaded already.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import linears, write_checkpoint

from vllm_ue8m0.checkpoint import writer
from vllm_ue8m0.checkpoint.convert import Summary, convert
from vllm_ue8m0.checkpoint.destination import JOURNAL, STAGING
from vllm_ue8m0.checkpoint.shards import CheckpointError, open_checkpoint
from vllm_ue8m0.reference import weight_quant

OPTIONS: dict[str, Any] = {"max_shard_bytes": 60_000, "workers": 2}
SYSTEM_CALLS = ("open", "pwrite", "write", "fsync", "replace", "unlink", "rmdir", "mkdir")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Weights for a dozen shards, and files beside them."""
    extra = {f"h.{i}.weight": torch.randn(130, 200 + i).bfloat16() for i in range(8)}
    source = write_checkpoint(tmp_path / "source", linears(), extra)
    (source / "tokenizer.json").write_text("{}" * 1000)
    return source


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def in_child(run: Callable[[], object]) -> int:
    """Fork; the child runs and leaves without cleaning up. Returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_no_checkpoint(directory: Path) -> None:
    """No loader can take the directory for a whole checkpoint."""
    assert not (directory / "config.json").exists()
    if directory.exists() and not list(directory.glob("*.safetensors")):
        with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
            open_checkpoint(directory)


def resume(source: Path, target: Path) -> None:
    """Continue, unless the kill came when all was done."""
    if (target / "config.json").exists() and not (target / JOURNAL).exists():
        return
    convert(source, target, **OPTIONS)


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    """kill -9 at 50 moments of a run, each continued (and some killed again): the same bytes."""
    convert(source, tmp_path / "whole", **OPTIONS)
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 12 and not any(name.startswith(".") for name in whole)
    begin = time.monotonic()
    assert status(in_child(lambda: convert(source, tmp_path / "timed", **OPTIONS))) == 0
    duration = time.monotonic() - begin
    draw, stopped, kept, runs = random.Random(7), 0, 0, 0
    while stopped < 50:
        target = tmp_path / f"killed-{runs}"
        for _ in range(1 + runs % 3):
            child = in_child(lambda target=target: resume(source, target))
            time.sleep(draw.random() * duration)
            os.kill(child, signal.SIGKILL)
            if status(child) == -signal.SIGKILL:
                stopped += 1
            else:
                duration *= 0.9  # measured while the machine had something else to do
            if (target / JOURNAL).exists():
                kept += len(list((target / STAGING).glob("*.safetensors")))
        resume(source, target)
        assert contents(target) == whole, runs
        runs += 1
    assert kept > 10  # kills came late enough for something to keep


def test_killed_at_every_system_call(source: Path, tmp_path: Path) -> None:
    """The same before the 1st, 2nd, ... call that changes the disk, with one worker."""
    one = {**OPTIONS, "workers": 1}
    convert(source, tmp_path / "whole", **one)
    whole, count = contents(tmp_path / "whole"), 0

    def run(target: Path, calls: int) -> None:
        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls -= 1
                if calls < 0:
                    os._exit(9)
                return call(*args, **kwargs)

            return wrapper

        for name in SYSTEM_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        convert(source, target, **one)

    for calls in range(10_000):
        target = tmp_path / f"{calls}"
        code = status(in_child(lambda target=target, calls=calls: run(target, calls)))
        if code == 0:
            break
        assert code == 9
        count += 1
        if (target / "config.json").exists():
            assert whole.items() <= contents(target).items()
        else:
            assert_no_checkpoint(target)
        resume(source, target)
        assert contents(target) == whole, calls
        assert not (target / STAGING).exists()
        shutil.rmtree(target)
    assert count > 100


def test_errors_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {}
    for i in range(6):
        codes, scale = weight_quant(torch.randn(200, 200), ue8m0=False)
        tensors |= {f"{i}.weight": codes, f"{i}.weight_scale_inv": scale}
    source = write_checkpoint(tmp_path / "a", tensors)
    options = {"max_shard_bytes": 50_000, "requantize": True, "workers": 1}
    whole = convert(source, tmp_path / "b", **options)
    assert len(whole.errors) == 6
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "c", **options, progress=interrupt_after(4))
    with open(tmp_path / "c" / JOURNAL, "a") as file:
        file.write('{"5.weight": 0.0')  # cut short
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "c" / STAGING).iterdir()}
    assert len(kept) > 1
    assert convert(source, tmp_path / "c", **options) == whole
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert all((tmp_path / "c" / name).stat().st_ino == inode for name, inode in kept.items())


def interrupt_after(count: int) -> Callable[[int, int], None]:
    calls = iter(range(count))

    def progress(done: int, total: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_interrupt(source: Path, tmp_path: Path, workers: int) -> None:
    options = {**OPTIONS, "workers": workers}
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", **options, progress=interrupt_after(7))
    assert_no_checkpoint(tmp_path / "b")
    assert not list((tmp_path / "b" / STAGING).glob("*.tmp"))
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "b", **options, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert calls[0][0] > 0  # what the first run has done
    convert(source, tmp_path / "c", **OPTIONS)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_disk_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "whole", **OPTIONS)
    pwrite, calls = os.pwrite, iter(range(30))

    def full(file: int, data: memoryview, position: int) -> int:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[:1000], position)  # a disk may take less than it is given

    monkeypatch.setattr(writer.os, "pwrite", full)
    for _ in range(2):
        with pytest.raises(OSError, match=r"No space left .* the same command continues.*/b'$"):
            convert(source, tmp_path / "b", **OPTIONS)
        assert_no_checkpoint(tmp_path / "b")
        calls = iter(range(200))
    monkeypatch.undo()
    convert(source, tmp_path / "b", **OPTIONS)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


def test_file_size_limit(source: Path, tmp_path: Path) -> None:
    """The kernel itself refuses a write in the middle of a file."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            convert(source, tmp_path / "b")
        except OSError as error:
            assert error.errno == errno.EFBIG and "continues" in str(error)
            os._exit(3)

    assert status(in_child(limited)) == 3
    assert_no_checkpoint(tmp_path / "b")
    convert(source, tmp_path / "b")
    convert(source, tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for target in ("locked", "locked/b"):
        with pytest.raises(PermissionError, match="locked"):
            convert(source, tmp_path / target)


def interrupted(source: Path, target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, **OPTIONS, progress=interrupt_after(5))


def test_another_conversion_is_not_continued(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    interrupted(source, target)
    before = contents(target)
    others = {
        "to was 'ue8m0' and is 'fp32-scales'": {"to": "fp32-scales"},
        "scale_dtype was 'float32' and is 'uint8'": {"scale_dtype": "uint8"},
        "max_shard_bytes was 60000": {"max_shard_bytes": 70_000},
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=rf"/b holds an interrupted .*: {message}"):
            convert(source, target, **{**OPTIONS, **other})
    os.utime(source / "tokenizer.json", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"the source's tokenizer\.json has changed"):
        convert(source, target, **OPTIONS)
    assert contents(target) == before
    (target / JOURNAL).write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(source, target, **OPTIONS)


def test_finished_conversion_is_not_repeated(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b", **OPTIONS)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        convert(source, tmp_path / "b", **OPTIONS)


def test_cut_shard_is_redone(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "b")
    shard = next((tmp_path / "b" / STAGING).glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    convert(source, tmp_path / "b", **OPTIONS)
    convert(source, tmp_path / "c", **OPTIONS)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "b")
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="another process is converting") as error:
                convert(source, tmp_path / "b", **OPTIONS)
            refused.append(str(error.value))

    convert(source, tmp_path / "b", **OPTIONS, progress=second)
    assert refused and (tmp_path / "b" / "config.json").exists()


def test_links_to_the_source_are_not_written(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for target in ("link", "link/b"):
        with pytest.raises(CheckpointError, match="lies in the source"):
            convert(source, tmp_path / target)
    with pytest.raises(CheckpointError, match="lies in the source"):
        convert(tmp_path / "link", source / "b")
    # Hard links under the very names that are written first.
    interrupted(source, tmp_path / "b")
    files = list(source.glob("*.safetensors"))
    shards = [path.name for path in (tmp_path / "b" / STAGING).glob("*.safetensors")]
    for name in (*shards, "config.json", "tokenizer.json"):
        for place in (tmp_path / "b", tmp_path / "b" / STAGING):
            for suffix in ("", ".tmp"):
                (place / (name + suffix)).unlink(missing_ok=True)
                os.link(files[0], place / (name + suffix))
    convert(source, tmp_path / "b", **OPTIONS)
    assert contents(source) == before


def test_number_of_workers_changes_no_byte(source: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for workers in (1, 2, 7):
        convert(source, tmp_path / f"{workers}", max_shard_bytes=60_000, workers=workers)
    one, *others = (contents(tmp_path / f"{workers}") for workers in (1, 2, 7))
    assert all(other == one for other in others)
    assert torch.get_num_threads() == threads


def test_progress_after_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB done before, 1 GB in 10 seconds: 100 MB/s and 70 s for the other 7 GB."""
    now, stream = 1000.0, StringIO()
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    progress = writer.Progress(stream)
    progress(2 * 10**9, 10**10)
    now += 10
    progress(3 * 10**9, 10**10)
    first, last = stream.getvalue().splitlines()
    assert first.endswith("20%  2.00/10.00 GB")  # no rate is known yet
    assert "30%  3.00/10.00 GB  100 MB/s  1:10 left" in last


def test_summary_counts_the_earlier_run(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "b")
    found = convert(source, tmp_path / "b", **OPTIONS)
    assert found == convert(source, tmp_path / "c", **OPTIONS)
    assert isinstance(found, Summary) and not found.errors
