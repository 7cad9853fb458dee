"""Compiling kernels for a GPU that is not there, in a process of its own; see test_compile.py."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_INSTRUCTIONS = r"""
    wgmma\.mma_async\S+ | mma\.sync\S+ | cvt\.rn\.satfinite\.e4m3x2\.f32 | cp\.async\.bulk\.tensor
  | griddepcontrol\.\w+ | (?:ld|st)\.global(?:\.\w+)*\.v4\.b32
"""


def report(script, *arguments):
    """What a script's lines "name: text" say, run without triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, script, *map(str, arguments)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


def number(line, unit):
    """The number before a unit: number(line, "bytes spilled")."""
    return int(re.search(rf"(\d+) {unit}", line)[1])


def target(capability):
    """A GPU; and the active driver, which target_info asks, for a machine without one."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("cuda", capability, 32)
    driver = type("Driver", (), {"get_current_target": staticmethod(lambda: gpu)})
    triton.runtime.driver.set_active(driver())
    return gpu


def compile_and_print(name, source, gpu, options):
    """Prints "name: BYTES bytes spilled, ..., instructions of interest"."""
    import triton

    compiled = triton.compile(source, target=gpu, options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tools / "cuobjdump", "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(_INSTRUCTIONS, compiled.asm["ptx"], re.VERBOSE))
    used = {re.sub(r"global\S*\.v4", "global.v4", instruction) for instruction in used}
    spilled = re.search(r"STACK:(\d+)", usage).group(1)
    registers = re.search(r"REG:(\d+)", usage).group(1)
    text = f"{spilled} bytes spilled, {registers} registers, {compiled.metadata.shared} shared"
    print(f"{name}: {text}, {' '.join(sorted(used))}", flush=True)
