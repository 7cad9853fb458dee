"""Compiling kernels for a GPU that is not there, in a process of its own; see test_compile.py."""

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_INSTRUCTIONS = r"""
    wgmma\.mma_async\S+ | mma\.sync\S+ | tcgen05\.mma\S+
  | cvt\.rn\.satfinite\.e4m3x2\.f32 | cp\.async\.bulk\.tensor
  | fma\.rn(?:\.\w+)+ | griddepcontrol\.\w+ | (?:ld|st)\.global(?:\.\w+)*\.v4\.b32
"""


@cache
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
    """Prints "name: kernel, BYTES bytes spilled, ..., instructions of interest"."""
    import triton

    from vllm_ue8m0.kernels.config import FMA

    compiled = triton.compile(source, target=gpu, options={**FMA, **options})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tools / "cuobjdump", "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(_INSTRUCTIONS, compiled.asm["ptx"], re.VERBOSE))
    used = {re.sub(r"global\S*\.v4", "global.v4", instruction) for instruction in used}
    order = re.findall(r"griddepcontrol\.(\w+)", compiled.asm["ptx"])
    if order[:1] == ["launch_dependents"]:
        used.add("dependents-before-wait")
    spilled = re.search(r"STACK:(\d+)", usage).group(1)
    registers = re.search(r"REG:(\d+)", usage).group(1)
    text = f"{spilled} bytes spilled, {registers} registers, {compiled.metadata.shared} shared"
    if tensor_memory := getattr(compiled.metadata, "tmem_size", None):
        text += f", {tensor_memory} tensor columns"
    text = f"{name}: {source.fn.__name__}, {text}, {' '.join(sorted(used))}"
    print(text.rstrip(", "), flush=True)


class Launches:
    """In place of a Gluon kernel: compiles for sm_90 what it is launched with, under `name`."""

    def __init__(self, kernel) -> None:
        self.kernel, self.target = kernel, target(90)

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **keywords):
        from triton.experimental.gluon._runtime import GluonASTSource

        names = self.kernel.arg_names
        options = {k: keywords.pop(k) for k in tuple(keywords) if k not in names}
        values = dict(zip(names, arguments, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            kind, divisible = (
                ("constexpr", False) if parameter.is_constexpr else self.describe(value)
            )
            if kind == "constexpr":
                constants[(i,)] = value
            elif not parameter.do_not_specialize and kind == "i32" and value == 1:
                kind, constants[(i,)] = "constexpr", 1
            if divisible and kind != "constexpr" and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
        source = GluonASTSource(self.kernel, signature, constants, attributes)
        compile_and_print(self.name, source, self.target, options)

    @staticmethod
    def describe(value):
        """Triton's type, and whether it is known to be a multiple of 16."""
        import torch

        names = {
            torch.uint8: "u8",
            torch.float32: "fp32",
            torch.bfloat16: "bf16",
            torch.int32: "i32",
            torch.float8_e4m3fn: "fp8e4nv",
        }
        if value is None or isinstance(value, bool):
            return "constexpr", False
        if isinstance(value, int):
            return "i32", value % 16 == 0
        if isinstance(value, torch.Tensor):
            return f"*{names[value.dtype]}", True
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{names[value.base.dtype]}[{block}],{value.layout!r}>", False


def empty(*shape, dtype="f32"):
    """A tensor without memory."""
    import torch

    dtypes = {"u8": torch.uint8, "f32": torch.float32, "bf16": torch.bfloat16}
    dtypes |= {"i32": torch.int32, "e4m3": torch.float8_e4m3fn}
    return torch.empty(*shape, dtype=dtypes[dtype], device="meta")
