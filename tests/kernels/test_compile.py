"""Every kernel compiles for sm_89 and sm_90, without a GPU; run as a script it is the compiler.

A process of its own, because triton's interpreter replaces the language when it is imported.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BYTES, CODES, F32, BF16, I64 = "*u8", "*fp8e4nv", "*fp32", "*bf16", "*i64"


@pytest.mark.parametrize("capability", [89, 90])
def test_compiles(capability):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, __file__, str(capability)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert len(report) == 9
    for rows in (16, 1024):
        instruction = "m16n8k32.row.col.f32.e4m3" if capability == 89 else "m64n128k32.f32.e4m3"
        if (capability, rows) != (90, 16):  # too few rows for wgmma: fp16 operands, as exact
            assert instruction in report[f"gemm {rows}"]
        assert "spilled 0 " in report[f"gemm {rows}"]


def compile_all(capability: int) -> None:
    """Print "name: spilled BYTES, matrix instructions" for each kernel."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_ue8m0.kernels import act_quant, gemm, grouped_gemm, silu_mul_quant, weight_dequant

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def build(name, kernel, pointers, constants, **options):
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                continue
            signature[argument] = pointers.get(argument, "i32")
            if argument in pointers or argument in (
                "N",
                "K",
                "stride_am",
                "stride_wn",
                "stride_we",
            ):
                attributes[(i,)] = [["tt.divisibility", 16]]
        constants = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [tools / "cuobjdump", "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S+", compiled.asm["ptx"]))
        spilled = re.search(r"STACK:(\d+)", usage).group(1)
        print(f"{name}: spilled {spilled} bytes, {' '.join(sorted(used))}", flush=True)

    def build_gemm(name, rows, dtype, kernel, pointers, constants):
        gran = (128, 128)
        config = gemm.tile_config(rows, dtype, gran)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        a = CODES if dtype == torch.float8_e4m3fn else BF16
        pointers = {"a": a, "w": CODES, "sf": BYTES, "out": BF16, **pointers}
        if a == CODES:
            pointers["a_s"] = BYTES
        else:
            constants["a_s"] = None
        flags = {"HAS_C": False, "c": None, "EVEN_K": True, "QUANTIZED": a == CODES}
        grans = {"GRAN_N": gran[0], "GRAN_K": gran[1]}
        build(name, kernel, pointers, {**constants, **flags, **grans, **config}, **options)

    quant = {"FLOOR": 105, "GROUP": 128, "ROWS": 16}
    for name, scale in (("ue8m0", BYTES), ("fp32", F32)):
        pointers = {"x": BF16, "q": BYTES, "s": scale}
        build(f"act_quant {name}", act_quant._act_quant_kernel, pointers, quant)
    pointers = {"gate_up": BF16, "out": BYTES, "s": BYTES}
    kernel = silu_mul_quant._silu_mul_quant_kernel
    build("silu_mul_quant", kernel, pointers, {**quant, "QUANTIZE": True})
    pointers = {"w": CODES, "sf": BYTES, "out": BF16}
    constants = {"c": None, "HAS_C": False, "BLOCK_N": 32, "BLOCK_K": 128}
    build("weight_dequant", weight_dequant._weight_dequant_kernel, pointers, constants)
    dense = {"bias": None, "HAS_BIAS": False, "GROUP_M": 8}
    for rows in (16, 1024):
        dtype = torch.float8_e4m3fn
        build_gemm(f"gemm {rows}", rows, dtype, gemm._gemm_kernel, {}, dict(dense))
    build_gemm("gemm bf16", 64, torch.bfloat16, gemm._gemm_kernel, {}, dict(dense))
    routed = {"order": I64, "tile_expert": I64, "tile_start": I64, "ends": I64}
    routed["slot_weights"] = F32
    constants = {"HAS_WEIGHTS": True, "GATHER": False}
    kernel = grouped_gemm._grouped_gemm_kernel
    build_gemm("grouped_gemm", 64, torch.float8_e4m3fn, kernel, routed, constants)
    pointers = {"slots": BF16, "topk_ids": I64, "out": BF16}
    constants = {"BLOCK_M": 4, "BLOCK_N": 512}
    build("combine", grouped_gemm._combine_kernel, pointers, constants)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
