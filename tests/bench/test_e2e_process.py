"""Programs that have started others: all of them end, whatever ends the bench."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vllm_ue8m0.bench.e2e_process import started

# A program with one of its own, which does not end when asked to. `file` gets both numbers.
PROGRAM = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with open({file!r} + ".part", "w") as file:
    print(os.getpid(), child.pid, file=file)
os.rename({file!r} + ".part", {file!r})
child.wait()
"""
# A shell's background ignores SIGINT, and so does what tests that run there start.
BENCH = """
import os, signal, sys
from vllm_ue8m0.bench.e2e_process import started
signal.signal(signal.SIGINT, signal.default_int_handler)
with started([sys.executable, "-c", {program!r}], os.environ) as process:
    process.wait()
"""


@pytest.fixture
def program(tmp_path):
    """Its source, and a function that waits for the numbers of its processes."""
    file = tmp_path / "numbers"

    def numbers():
        until = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        return [int(word) for word in file.read_text().split()]

    return PROGRAM.format(file=str(file)), numbers


def gone(pids):
    """Within a second; a zombie is gone."""
    for _ in range(50):
        states = []
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    states.append(stat.read().rpartition(")")[2].split()[0])
            except (FileNotFoundError, ProcessLookupError):
                states.append("Z")
        if set(states) == {"Z"}:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_they_end_with_a_bench_that_is_stopped(program, number):
    source, numbers = program
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH.format(program=source)], stderr=subprocess.DEVNULL
    )
    pids = numbers()
    assert not gone(pids[:1])
    bench.send_signal(number)
    status = bench.wait(30)
    assert status == 128 + number if number == signal.SIGTERM else status != 0
    assert gone(pids)


def test_they_end_with_an_error_and_at_the_end(program):
    source, numbers = program
    with pytest.raises(KeyError), started([sys.executable, "-c", source], os.environ):
        pids = numbers()
        raise KeyError
    assert gone(pids)
    before = signal.getsignal(signal.SIGTERM)
    with started([sys.executable, "-c", "raise SystemExit(7)"], os.environ) as process:
        assert process.wait() == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_a_thread(program):
    """Where no handler can be set."""
    source, numbers = program
    found = []

    def run():
        with started([sys.executable, "-c", source], os.environ):
            found.extend(numbers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert len(found) == 2 and gone(found)
