"""Run `vllm serve` as a child process: used by demo.py and by the tests."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve(model: Path | str, *args: str, log: Path, minutes: float = 10) -> Iterator[str]:
    """Start the server, wait until it answers, yield its base URL, stop it at the end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # The program `vllm`, of this Python wherever its scripts are.
    vllm = (sys.executable, "-m", "vllm.entrypoints.cli.main")
    command = [*vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *args]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    print("$ vllm serve", model, *args, flush=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log, minutes)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _wait(url: str, process: subprocess.Popen, log: Path, minutes: float) -> None:
    start = time.monotonic()
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            print(f"\rready after {time.monotonic() - start:.0f} s" + " " * 60, flush=True)
            return
        seconds = time.monotonic() - start
        if process.poll() is not None or seconds > 60 * minutes:
            tail = log.read_text(errors="replace").splitlines()[-30:]
            raise RuntimeError("the server did not start; its log ends:\n" + "\n".join(tail))
        print(f"\rwaiting for the server: {seconds:.0f} s", end="", flush=True)
        time.sleep(1)
