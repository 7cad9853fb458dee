"""Compile kernels in other processes, which have no GPU; Triton's cache on disk has them then.

Threads do not help as much: Triton's front end, about half of the time, holds the interpreter's
lock. What a process compiles is what Triton itself would: `jit_cache_hook` is given all that
`preload` needs. Both are Triton's since before 3.6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from . import replay


class Kernel(NamedTuple):
    """A kernel for arguments of one kind: `name` in `module`, and Triton's description."""

    module: str
    name: str
    data: str


@contextmanager
def recording() -> Iterator[list[Kernel]]:
    """Nothing that is launched inside is compiled or launched: new kernels are appended here."""
    found: dict[Kernel, None] = {}
    kernels: list[Kernel] = []

    def note(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        function = fn.jit_function.fn
        kernel = Kernel(function.__module__, function.__name__, compile["specialization_data"])
        if kernel not in found:
            found[kernel] = None
            kernels.append(kernel)
        return True

    def bind(self: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.run(*args, grid=grid, warmup=True, **options)

    hook, launch = knobs.runtime.jit_cache_hook, KernelInterface.__getitem__
    knobs.runtime.jit_cache_hook, KernelInterface.__getitem__ = note, bind
    try:
        with replay.off():
            yield kernels
    finally:
        knobs.runtime.jit_cache_hook, KernelInterface.__getitem__ = hook, launch


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that are compiled inside, because no cache has them."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            names.append(src.fn.fn.__name__)

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def precompile(
    kernels: Sequence[Kernel], capability: int, processes: int, progress: Callable[[], None]
) -> list[str]:
    """Compile those that the cache does not have, for sm_`capability`; a line for each error.

    progress is called after each kernel, from any thread.
    """
    queue: SimpleQueue[Kernel] = SimpleQueue()
    for kernel in kernels:
        queue.put(kernel)
    command = [sys.executable, "-m", __name__, str(capability)]
    # A process that finds no GPU has no CUDA context beside the weights.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def work(_: int) -> list[str]:
        errors = []
        with subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            while True:
                try:
                    kernel = queue.get_nowait()
                except Empty:
                    break
                try:
                    print(json.dumps(kernel), file=process.stdin, flush=True)
                    answer = process.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                if answer.strip() != "done":
                    errors.append(f"{kernel.name}: {answer.strip() or 'the process ended'}")
                if not answer:
                    break
                progress()
            process.stdin.close()
        return errors

    processes = min(processes, len(kernels))
    with ThreadPoolExecutor(max(1, processes)) as pool:
        return [line for errors in pool.map(work, range(processes)) for line in errors]


class _NoGpu:
    """Triton's driver for a GPU that is elsewhere."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def main(capability: str) -> None:
    """Kernels from stdin, a line each; answers "done", or what went wrong."""
    driver.set_active(_NoGpu(int(capability)))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            module, name, data = json.loads(line)
            compiled = getattr(import_module(module), name).preload(data)
            with suppress(Exception):  # its reason is for who launches
                _compile_launcher(compiled)
            answer = "done"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers, flush=True)


def _compile_launcher(compiled: Any) -> None:
    """What Triton compiles in C to launch a kernel, until 3.8, and keeps in its cache too."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(compiled.src, compiled.metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
