"""The directory that a conversion writes, so that a killed one can be continued.

DST/.converting.jsonl   what is converted and how; then a line for every shard with errors to
                        report. It is there from the first byte to the last
DST/.converting/        shards, under their own names when they are whole and on disk
DST/                    at the end: shards, other files, index, config.json, in this order

Nothing in DST looks like a checkpoint before all of it is whole. After a kill at any moment the
same command continues; the journal proves that source and options are the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .shards import INDEX_NAME, CheckpointError
from .writer import TEMPORARY, copy_file, sync_directory, write_file, write_json

JOURNAL = ".converting.jsonl"
_NEW_JOURNAL = JOURNAL + TEMPORARY
STAGING = ".converting"


def fingerprint(
    source: Path, files: Iterable[Path], options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a conversion depends on: its options, and size and time of every file it reads."""
    stats = {str(file.relative_to(source)): file.stat() for file in files}
    return {
        "options": dict(options),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def check_apart(src: Path, dst: Path) -> None:
    """Raise CheckpointError if writing `dst` could touch `src`, under whatever names."""
    source, target = src.resolve(), dst.resolve()
    # By inode too: one directory may be mounted in two places.
    inside = any(p.exists() and p.samefile(source) for p in (target, *target.parents))
    around = target.exists() and any(p.samefile(target) for p in source.parents)
    if inside or around:
        raise CheckpointError(f"{dst} is, contains or lies in the source {src}; give another DST.")


class Destination:
    """DST of one conversion: new or empty, or left by an interrupted run of the same one."""

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        """Look only; raises CheckpointError if `path` holds anything else."""
        self.path, self.staging, self.journal = path, path / STAGING, path / JOURNAL
        self.plan = json.loads(json.dumps(plan))  # as the journal gives it back
        self.errors: dict[str, float] = {}
        self.created = not path.exists()
        self.resumed = self.journal.exists()
        self.file: int | None = None
        if self.resumed:
            self._read_journal()
        elif path.exists() and (not path.is_dir() or set(os.listdir(path)) - {_NEW_JOURNAL}):
            raise CheckpointError(f"{path} exists and is not an empty directory; remove it first.")

    def _read_journal(self) -> None:
        try:
            with open(self.journal, encoding="utf-8") as file:
                found = json.loads(file.readline())
                lines = file.readlines()
            changed = _difference(found, self.plan)
        except (ValueError, KeyError, TypeError, AttributeError):
            changed = f"{JOURNAL} is damaged"
        if changed is not None:
            raise CheckpointError(
                f"{self.path} holds an interrupted conversion of another kind: {changed}. Rerun "
                "the command that began it to continue, or remove the directory to begin anew."
            )
        for line in lines:
            try:
                self.errors.update(json.loads(line))
            except ValueError:  # cut short by a kill; its shard had no name yet and is redone
                continue

    def check_space(self, needed: int) -> None:
        """Raise CheckpointError if the disk has no room for what is not yet there."""
        existing = next(
            p for p in (self.path.resolve(), *self.path.resolve().parents) if p.exists()
        )
        staged = self.staging.iterdir() if self.resumed and self.staging.is_dir() else ()
        needed -= sum(file.stat().st_size for file in staged)
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise CheckpointError(
                f"{self.path} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free "
                "there."
            )

    def open(self) -> None:
        """Begin to write: the journal first. One process at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            first = json.dumps(self.plan) + "\n"
            write_file(self.journal, lambda file: file.write(first.encode()))
        self.file = os.open(self.journal, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(f"another process is converting into {self.path}.") from None
        self.staging.mkdir(exist_ok=True)
        for file in self.staging.glob("*" + TEMPORARY):
            file.unlink()

    def has(self, file: str, size: int) -> bool:
        """Whether a shard is there and whole."""
        paths = (self.staging / file, self.path / file)
        return self.resumed and any(p.exists() and p.stat().st_size == size for p in paths)

    def record(self, errors: Mapping[str, float]) -> None:
        """Keep the errors of a shard's tensors; to be called before the shard gets its name."""
        assert self.file is not None
        self.errors.update(errors)
        if errors:
            # On a line of its own, should the one before have been cut short.
            os.write(self.file, ("\n" + json.dumps(dict(errors)) + "\n").encode())
            os.fsync(self.file)

    def publish(
        self,
        weight_map: Mapping[str, str],
        total_size: int,
        others: Mapping[Path, Path],
        config: Mapping[str, Any],
    ) -> None:
        """Make the checkpoint of whole shards; the journal's removal is the last step."""
        files = sorted(set(weight_map.values()))
        for file in files:
            if (self.staging / file).exists():
                os.replace(self.staging / file, self.path / file)
        sync_directory(self.path)
        for name, source in others.items():
            copy_file(source, self.path / name)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": total_size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.path / INDEX_NAME, index)
        write_json(self.path / "config.json", config)
        shutil.rmtree(self.staging)
        self.journal.unlink()
        sync_directory(self.path)

    def discard(self) -> None:
        """Remove everything: what was written is of no use."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        if self.created and not os.listdir(self.path):
            self.path.rmdir()

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _difference(found: dict[str, Any], plan: dict[str, Any]) -> str | None:
    """What differs first between a journal's plan and this run's, in words."""
    for key, value in plan["options"].items():
        if found["options"].get(key) != value:
            return f"{key} was {found['options'].get(key)!r} and is {value!r}"
    for name in sorted(found["source"].keys() | plan["source"].keys()):
        if found["source"].get(name) != plan["source"].get(name):
            return f"the source's {name} has changed since"
    return None
