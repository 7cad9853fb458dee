"""The self-test: what run_cases.py, in a process of its own, says of this machine's kernels."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO

from .facts import Kernel

COMMAND = (sys.executable, "-m", f"{__package__}.run_cases")
SILENCE_S = 300  # for one case, of which compiling its kernels takes seconds
Say = Callable[[str], None]
Pair = tuple[str, str]  # operator, backend


@dataclass(frozen=True)
class Checked:
    """An operator's kernels of a backend, held against plain torch.

    cases      calls that were compared
    bitwise    whether every result is plain torch's bit for bit
    diff       the largest calc_diff of a first result: of codes, or of a product
    error      what is wrong: a result, an exception, or how the process ended
    no_memory  whether the error is that the GPU has too little free, which says nothing of kernels
    """

    operator: str
    backend: str
    cases: int = 0
    bitwise: bool = False
    diff: float = 0.0
    error: str | None = None
    no_memory: bool = False


def to_check(kernels: Iterable[Kernel]) -> list[Pair]:
    """What serving here may launch: each operator's backend, and what that hands over to."""
    pairs: list[Pair] = []
    chosen: set[str] = set()
    for kernel in kernels:  # an operator's backends in the order in which they are tried
        if kernel.status == "chosen":
            chosen.add(kernel.operator)
        usable = kernel.status != "refused" and kernel.operator in chosen
        if usable and kernel.backend != "reference":
            pairs.append((kernel.operator, kernel.backend))
    return pairs


def ask(pairs: Sequence[Pair], say: Say) -> list[Checked]:
    """Check each; `say` gets a line before. Seconds where kernels are in Triton's cache.

    An operator that raises, crashes or hangs ends the process; the others are run in another one.
    """
    found: list[Checked] = []
    while len(found) < len(pairs):
        found += _ask(pairs, len(found), say)
    return found


def _ask(pairs: Sequence[Pair], start: int, say: Say) -> list[Checked]:
    """What one process says of the pairs from `start` on: of at least one of them."""
    found: list[Checked] = []
    case = None
    rest = pairs[start:]
    command = [*COMMAND, *map(":".join, rest)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        lines: SimpleQueue[str | None] = SimpleQueue()
        Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=SILENCE_S)) is not None:
                if not line.startswith("{"):  # of a library, as it was imported
                    continue
                answer = json.loads(line)
                if "case" in answer:
                    if case is None:
                        operator, backend = rest[len(found)]
                        number = f"{start + len(found) + 1} of {len(pairs)}"
                        say(f"self-test {number}: {operator} on {backend}")
                    case = answer["case"]
                else:
                    if answer["error"] is not None and case is not None:
                        answer["error"] = f"{case}: {answer['error']}"
                    found.append(Checked(**answer))
                    case = None
            ended = f"the process ended with {_status(process.wait())}"
        except Empty:
            ended = f"it took more than {SILENCE_S} s"
        finally:
            process.kill()
        log.seek(0)
        last = next((text for text in reversed(log.read().splitlines()) if text.strip()), None)
    if last is not None:
        ended += f": {last.strip()}"
    if case is not None:
        found.append(Checked(*rest[len(found)], error=f"{case}: {ended}"))
    return found or [Checked(*pair, error=ended) for pair in rest]


def _forward(stream: IO[str], lines: SimpleQueue[str | None]) -> None:
    """All lines of a stream, then None: a pipe cannot be read with a time limit."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"
