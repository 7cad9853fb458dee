"""Run the pieces of a conversion on several threads.

Threads, not processes: torch releases the interpreter's lock in every pass over a piece. On two
cores, two threads quantized 1.5 GB/s, two processes 1.3, one thread 0.9 (2026-11-22), and a process
more would cost another 200 MB for torch alone.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import torch

from .shards import CheckpointError

Task = Callable[[], int]  # returns the bytes it has done
DEFAULT_MEMORY = 2 << 30
# What the allocator and the threads' stacks take besides, and how far freed memory lags behind.
_FIXED = 32 << 20
_SLACK = 1.25

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "500MB", "1.5g" or "1048576"; KB is 1000 bytes, KiB is 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 2GiB, 500MB or 1048576.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.lower()])


def choose_workers(workers: int | None, max_memory: int | None, planned: int, piece: int) -> int:
    """How many workers fit: at most `workers`, by default one per core.

    planned bytes are needed once, `piece` bytes by each worker. Raises CheckpointError if not
    even one worker fits.
    """
    wanted = workers or _cores()
    budget = DEFAULT_MEMORY if max_memory is None else max_memory
    fixed, each = planned + _FIXED, int(piece * _SLACK)
    if max_memory is not None and budget < fixed + each:
        raise CheckpointError(
            f"--max-memory is {budget / 2**20:.0f} MiB; this checkpoint needs at least "
            f"{-(-(fixed + each) // 2**20)} MiB: {fixed / 2**20:.0f} MiB, and "
            f"{each / 2**20:.0f} MiB for each worker."
        )
    return max(min(wanted, (budget - fixed) // each), 1)


def _cores() -> int:
    """Those this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tasks(tasks: Iterator[Task], workers: int, report: Callable[[int], None]) -> None:
    """Run all tasks; `report` is called in this thread with the bytes of each one done.

    The first exception, also one of `report` or Ctrl-C, stops the rest and is raised when every
    worker has stopped.
    """
    results: SimpleQueue[int | BaseException | None] = SimpleQueue()
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        torch.set_num_threads(1)  # of this thread: the workers are the parallelism
        try:
            while not stop.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    break
                results.put(task())
        except BaseException as error:
            stop.set()
            results.put(error)
        finally:
            results.put(None)

    threads = torch.get_num_threads()
    running = [threading.Thread(target=work, name=f"convert-{i}") for i in range(workers)]
    for thread in running:
        thread.start()
    left, error = workers, None
    try:
        while left:
            result = results.get()
            if result is None:
                left -= 1
            elif isinstance(result, int):
                report(result)
            else:
                error = error or result
    finally:
        stop.set()
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)
    if error is not None:
        raise error
