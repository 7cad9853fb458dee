"""vLLM's processes: what a program started ends with it, and with this one, however that ends.

vLLM's engines and workers hold a GPU's memory, and outlive a parent that is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STOP_SECONDS = 60


@contextlib.contextmanager
def started(
    command: Sequence[str], env: Mapping[str, str], **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A program in a session of its own. At the end it is asked to stop, then its session killed.

    options: of subprocess.Popen.
    """
    with _terminated_is_left(), subprocess.Popen(
        command, env=dict(env), start_new_session=True, **options
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            try:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what is left of its processes


@contextlib.contextmanager
def _terminated_is_left() -> Iterator[None]:
    """SIGTERM, which would end this process as it stands, leaves by an exception."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only it may have handlers
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
