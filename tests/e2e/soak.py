"""Serve a model under mixed steady load, and say whether the server is as it was before.

    python tests/e2e/soak.py MODEL --requests 500 --minutes 20 [options of vllm serve]

Several clients at a time ask for completions and chats, streaming or not, of one token up to the
limit, greedy or not, many with a shared beginning; they leave in the middle of streams, ask for
more than the limit and send what is no request (soak_load.py). Held against what has to be are,
besides the form of every answer:

  probes    greedy prompts, asked alone before and after: the same text
  memory    of the server's processes, there and on the GPUs: the same after a third and at the end
  log       no error and no traceback
  metrics   no request running or waiting at the end

Prints a table and a line of JSON; the status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import aiohttp
from soak_load import Counts, Load, Wrong

PART = 3  # after one part of so many, what a server keeps is its own
CLIENTS = 6
GROWTH_MIB = 256
REQUEST_SECONDS = 900
SHOWN = 10  # lines of the log
LOG_ERROR = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback \(most recent call last\)")


class Memory(NamedTuple):
    """MiB: resident memory of the server's processes, and used memory of all GPUs or None."""

    rss: float
    gpu: float | None


class Report(NamedTuple):
    """What was seen; `failures` of the requests and of everything else."""

    counts: Counts
    memory: dict[str, Memory]
    probes: int
    failures: list[str]

    def to_json(self) -> dict:
        counts = self.counts
        return {
            "failures": self.failures,
            "requests": {kind: len(times) for kind, times in sorted(counts.seconds.items())},
            "median_s": {kind: round(median(t), 3) for kind, t in sorted(counts.seconds.items())},
            "load_s": round(counts.load_seconds, 1),
            "output_tokens": counts.tokens,
            "probes": self.probes,
            "memory_mib": {when: one._asdict() for when, one in self.memory.items()},
        }

    def text(self) -> str:
        lines = [f"{'':<20}{'requests':>10}{'median s':>10}"]
        for kind, times in sorted(self.counts.seconds.items()):
            lines.append(f"{kind:<20}{len(times):>10}{median(times):>10.2f}")
        lines.append(f"{'memory, MiB':<20}{'processes':>10}{'GPUs':>10}")
        for when, one in self.memory.items():
            gpu = "-" if one.gpu is None else f"{one.gpu:.0f}"
            lines.append(f"{when:<20}{one.rss:>10.0f}{gpu:>10}")
        lines.append(f"{self.probes} probes, {self.counts.tokens} tokens in the load's answers")
        lines += [f"FAILED: {failure}" for failure in self.failures]
        return "\n".join(lines)


async def soak(
    url: str, measure: Callable[[], Memory], requests: int = 200, minutes: float = 10,
    clients: int = CLIENTS, seed: int = 0, growth_mib: float = GROWTH_MIB,
) -> Report:  # fmt: skip
    """Load a server with so many requests, or for so long; `measure` its memory."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    memory: dict[str, Memory] = {}
    # A connection for each request. An idle one may be closed by the server (by vLLM after 5 s,
    # VLLM_HTTP_TIMEOUT_KEEP_ALIVE) just when it is used again, which a busy client does not see in
    # time: "Can not write request body", 4 of 42 requests on two busy cores.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        load = Load(session, url, seed)
        failures, before = load.counts.failures, []
        try:
            await load.look()
            before = await load.probe()
            memory["before"] = measure()
            first, end = requests // PART, time.monotonic() + 60 * minutes
            await load.run(first, clients, end - 60 * minutes * (1 - 1 / PART))
            memory["after a third"] = measure()
            await load.run(requests - first, clients, end)
            after = await load.probe()
            memory["at the end"] = measure()
            left = await load.left()
        except (Wrong, KeyError, ValueError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            failures.append(f"the soak ended early: {type(error).__name__} {error}")
            return Report(load.counts, memory, len(before), failures)
    for old, new in zip(before, after, strict=True):
        if old != new:
            failures.append(f"a probe's answer was {old!r} and is now {new!r}")
    if left != 0:  # NaN: there is no such metric
        failures.append(f"{left} requests are running or waiting at the end")
    ends = memory["after a third"], memory["at the end"]
    for name, old, new in zip(Memory._fields, *ends, strict=True):
        if old is not None and new - old > growth_mib:
            failures.append(f"{name} grew by {new - old:.0f} MiB, allowed are {growth_mib:.0f}")
    return Report(load.counts, memory, len(before), failures)


def log_errors(text: str) -> list[str]:
    """Lines of a server's log that say ERROR, CRITICAL or Traceback."""
    return [line for line in text.splitlines() if LOG_ERROR.search(line)]


def server_pid(url: str) -> int:
    """The process that was started with this port, a child of ours."""
    port = url.rpartition(":")[2]
    for pid in _processes():
        command = _read(pid, "cmdline").split("\0")
        if _stat(pid)[1] == os.getpid() and port in command:
            return pid
    raise LookupError(f"no child process has {port} among its arguments")


def memory_of(pid: int) -> Memory:
    """Of the session that a process leads."""
    session = [one for one in _processes() if _stat(one)[3] == pid]
    pages = [_read(one, "statm").split() for one in session]
    rss = sum(int(found[1]) for found in pages if found)
    return Memory(rss * os.sysconf("SC_PAGESIZE") / 2**20, _gpu_memory(session))


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it ended
        return ""


def _stat(pid: int) -> list[int]:
    """Of /proc/PID/stat, behind the name: state (0 here), parent, group, session."""
    numbers = _read(pid, "stat").rpartition(")")[2].split()
    return [0, *map(int, numbers[1:4])] if numbers else [0, 0, 0, 0]


def _gpu_memory(pids: list[int]) -> float | None:
    """Of these processes, or where nvidia-smi does not see them (containers) of all."""
    own = of_processes(_nvidia_smi("compute-apps=pid,used_gpu_memory"), pids)
    used = _nvidia_smi("gpu=memory.used").split()
    return own if own is not None else sum(map(float, used)) if used else None


def of_processes(listed: str, pids: list[int]) -> float | None:
    """The sum of lines `PID, MIB` of these processes; None if there is none."""
    lines = [line.split(", ") for line in listed.splitlines()]
    found = [mib for pid, mib in lines if pid.isdigit() and int(pid) in pids and mib.isdigit()]
    return sum(map(float, found)) if found else None


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


def main(arguments: list[str]) -> int:
    """Serve and load; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="at most")
    parser.add_argument("--clients", type=int, default=CLIENTS, metavar="N", help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth-mib", type=float, default=GROWTH_MIB, metavar="MIB")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log")
    options, engine = parser.parse_known_args(arguments)
    if "--quantization" not in engine:
        engine += ["--quantization", "ue8m0"]
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from server import serve

    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder, "server.log")
        with serve(options.model, *engine, log=log) as url:
            pid = server_pid(url)
            report = asyncio.run(
                soak(
                    url, lambda: memory_of(pid), options.requests, options.minutes,
                    options.clients, options.seed, options.growth_mib,
                )
            )  # fmt: skip
            errors = log_errors(log.read_text(errors="replace"))
            report.failures.extend(f"log: {line}" for line in errors[:SHOWN])
            if len(errors) > SHOWN:
                report.failures.append(f"log: {len(errors) - SHOWN} more such lines; see --log")
    print(report.text())
    print(json.dumps(report.to_json()))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
