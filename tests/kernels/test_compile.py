"""Every kernel compiles for each GPU it serves, without one; run as a script it is the compiler.

A process of its own, because triton's interpreter replaces the language when it is imported.
"""

import re
import sys
from pathlib import Path

import pytest
from offline_compiler import compile_and_print, number, report, target
from recorded_compilation import CAPABILITIES, check, recorded

KERNELS = Path(__file__).parents[2] / "vllm_ue8m0/kernels"
BYTES, CODES, F32, BF16, I32, I64 = "*u8", "*fp8e4nv", "*fp32", "*bf16", "*i32", "*i64"
# Every value of these is a multiple of 16 where it matters: 16-byte accesses.
ALIGNED = ("N", "K", "stride_am", "stride_wn", "stride_we", "stride_xm", "stride_m", "stride_rm")
ALIGNED += ("stride_xe", "stride_e", "stride_ae", "L", "R")
ALIGNED += ("stride_qm", "stride_qh", "stride_km", "stride_c", "stride_lm", "stride_block")
ALIGNED += ("stride_slot", "S", "total")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_as_recorded(capability):
    check(__file__, capability)


TABLES = sorted(path.stem for path in (Path(__file__).parent / "compiled").glob("*.txt"))


@pytest.mark.parametrize("release", TABLES)
def test_every_kernel_is_recorded(release):
    """The portable ones for each GPU, those of Hopper for it."""
    kernels = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    found = {
        section: {line.split(",")[0] for line in lines.values()}
        for section, lines in recorded(release).items()
    }
    assert set.union(*found.values()) == kernels
    hopper = {
        name for section in found if "test_compile.py" not in section for name in found[section]
    }
    hopper |= {"_count_kernel", "_place_kernel", "_tiles_kernel", "_route_quant_kernel"}
    for capability in CAPABILITIES:
        assert found[f"test_compile.py {capability}"] >= kernels - hopper


# What a program may have; of sm_86, whose kernels are those of sm_80, 99 KiB too.
SHARED_KIB = {80: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_suffices(capability):
    for name, line in report(__file__, capability).items():
        assert number(line, "shared") <= SHARED_KIB[capability] * 1024, f"{name}: {line}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantization_compiles(capability):
    lines = report(__file__, capability)
    kernels = {name: line for name, line in lines.items() if "quant" in name or "silu" in name}
    assert len(kernels) == 13
    for name, line in kernels.items():
        if name in ("act_quant ue8m0", "silu_mul_quant", "rms_norm_quant"):
            assert "ld.global.v4.b32" in line and "st.global.v4.b32" in line  # 16 bytes each
        if "_quant" in name and capability >= 89:
            assert "cvt.rn.satfinite.e4m3x2.f32" in line, f"{name}: {line}"
        pdl = name in ("act_quant ue8m0", "act_quant packed", "silu_mul_quant") and capability >= 90
        assert ("griddepcontrol.wait" in line) == pdl, f"{name}: {line}"
        # Not of layers' activations: shared experts' would take the SMs of vLLM's router.
        early = pdl and name == "silu_mul_quant"
        assert ("dependents-before-wait" in line) == early, f"{name}: {line}"


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c >= 90])
def test_a_rotation_rounds_its_products(capability):
    """Before, a product of bf16 numbers is itself an FMA, with zero."""
    lines = report(__file__, capability)
    assert "fma.rn" in lines["rms_norm"]
    for name in ("rotary bf16", "rotary fp32"):
        assert "fma" not in lines[name], lines[name]


# Bytes before sm_89, there with fp16 operands; on sm_90 and sm_100 too if the rows are too few for
# the instructions of four warps.
FP16_DOT = "m16n8k16.row.col.f32.f16"
DOTS = {
    80: FP16_DOT,
    89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3",
    90: "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
    100: "tcgen05.mma.cta_group::1.kind::f8f6f4",
    120: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3",
}
OF_FOUR_WARPS = {90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_compile(capability):
    lines = report(__file__, capability)
    for rows in (16, 1024):
        few = capability in OF_FOUR_WARPS and rows == 16
        assert (FP16_DOT if few else DOTS[capability]) in lines[f"gemm {rows}"]
    assert "gemm bf16 64" in lines and "gemm bf16 1024" in lines
    # Batch-invariant runs choose among these, by the rows: one kind of instruction.
    for name in ("batched_gemm 64", "grouped_gemm 64", "grouped_gemm 300", "grouped_gemm 1000"):
        kinds = [kind for kind in ("wgmma", "tcgen05.mma", "mma.sync") if kind in lines[name]]
        assert kinds == [OF_FOUR_WARPS.get(capability, "mma.sync")]


def test_block_scaled_products():
    """The tensor cores scale for every tile, and two programs fit into an SM's memories."""
    lines = report(__file__, 100)
    scaled = {name: line for name, line in lines.items() if "scaled" in name}
    assert len(scaled) == 4 * 4 + 4
    for name, line in scaled.items():
        instructions = [word for word in line.split() if "mma" in word]
        assert len(instructions) == 1, f"{name}: {line}"
        assert instructions[0].startswith("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale")
        assert number(line, "bytes spilled") == 0, f"{name}: {line}"
        assert number(line, "shared") <= SHARED_KIB[100] // 2 * 1024, f"{name}: {line}"
        assert number(line, "tensor columns") <= 512 // 2, f"{name}: {line}"


class Compiler:
    """Compiles one kernel at a time and prints what became of it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.target = target(capability)

    def build(self, name, kernel, pointers, constants, **options):
        from triton.compiler import ASTSource

        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                continue
            default = "fp32" if argument in ("eps", "side_eps", "factor") else "i32"
            signature[argument] = pointers.get(argument, default)
            if argument in pointers or argument in ALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
        constants = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
        source = ASTSource(kernel, signature, constants, attributes)
        compile_and_print(name, source, self.target, options)


def compile_quantization(build, capability: int) -> None:
    from vllm_ue8m0.kernels import (
        act_quant,
        config,
        rms_norm_quant,
        rotary,
        silu_mul_quant,
        weight_dequant,
        weight_quant,
    )

    tile = {"FLOOR": 105, "GROUP": 128, "ROWS": 8, "GROUPS": 4, "PDL": False}
    pdl = capability >= 90
    plain = {"MN_MAJOR": False, "PACKED": False}
    dense = {"counts": None, "destinations": None, "COPIES": 0, "EXPERTS": 0}
    kernel = act_quant._act_quant_kernel
    for name, scale, dependent in (("ue8m0", BYTES, pdl), ("fp32", F32, False)):
        pointers = {"x": BF16, "q": BYTES, "s": scale}
        constants = {**tile, **plain, **dense, "scale_rows": None, "PDL": dependent}
        build(f"act_quant {name}", kernel, pointers, constants)
    pointers = {"x": BF16, "q": BYTES, "s": I32, "counts": I32, "destinations": I64}
    pointers["scale_rows"] = I32
    packed = {"MN_MAJOR": True, "PACKED": True}
    sorted_rows = {"COPIES": 8, "EXPERTS": 32, "PDL": pdl}
    build("act_quant packed", kernel, pointers, {**tile, **packed, **sorted_rows})
    pointers = {"gate_up": BF16, "out": BYTES, "s": BYTES}
    kernel = silu_mul_quant._silu_mul_quant_kernel
    constants = {**tile, **plain, **dense, "QUANTIZE": True, "PDL": pdl}
    build("silu_mul_quant", kernel, pointers, constants)
    constants = {**tile, **plain, **dense, "QUANTIZE": False, "s": None}
    build("silu_mul", kernel, {"gate_up": BF16, "out": BF16}, constants)
    kernel = rms_norm_quant._rms_norm_quant_kernel
    pointers = dict.fromkeys(("x", "residual", "weight", "residual_out", "normed"), BF16)
    pointers |= {"q": BYTES, "s": BYTES}
    row = {**tile, **plain, "GROUPS": 64, "HAS_RESIDUAL": True}
    row |= {"HAS_NORMED": True, "QUANTIZE": True, "HAS_SHARED": False, "shared": None}
    del row["ROWS"]
    build("rms_norm_quant", kernel, pointers, row, num_warps=8)
    constants = {**row, "HAS_NORMED": False, "normed": None}
    build("rms_norm_quant fp32", kernel, pointers | {"s": F32}, constants, num_warps=8)
    constants = {**row, "QUANTIZE": False, "q": None, "s": None}
    build("rms_norm", kernel, pointers, constants, num_warps=8)
    del row["shared"]
    constants = {**row, "HAS_SHARED": True}
    build("rms_norm_quant of a sum", kernel, pointers | {"shared": BF16}, constants, num_warps=8)
    kernel = rms_norm_quant._latent_norm_quant_kernel
    pointers = dict.fromkeys(("x", "weight", "side_weight", "side", "rest"), BF16)
    pointers |= {"q": BYTES, "s": BYTES}
    row = {**tile, **plain, "GROUPS": 16, "REST": 64}
    for name in ("ROWS", "PACKED"):
        del row[name]
    build("latent_norm_quant", kernel, pointers, row, num_warps=8)
    row = {"NOPE": 128, "R": 64, "HEADS": 32, "PAIRS": 32, "LATENT": 512, "PDL": pdl}
    none = dict.fromkeys(("latent", "cache", "slots"))
    pointers = {"q": BF16, "k": BF16, "positions": I64, "cos_sin": BF16}
    for name, dtype in (("bf16", BF16), ("fp32", F32)):
        kinds = pointers | dict.fromkeys(("q", "k", "cos_sin"), dtype)
        build(f"rotary {name}", rotary._rotary_kernel, kinds, row | none, **config.NO_FMA)
    pointers |= {"latent": BF16, "cache": BF16, "slots": I64}
    build("rotary and cache", rotary._rotary_kernel, pointers, row, **config.NO_FMA)
    kernel = weight_quant._weight_quant_kernel
    for name, scale in (("ue8m0", BYTES), ("fp32", F32)):
        pointers = {"w": BF16, "q": BYTES, "s": scale}
        build(
            f"weight_quant {name}",
            kernel,
            pointers,
            {"BLOCK": 128},
            num_warps=config.weight_quant_warps(scale == BYTES),
        )
    kernel = weight_dequant._weight_dequant_kernel
    rows, columns, warps = weight_dequant.TILE
    constants = {"c": None, "HAS_C": False, "BLOCK_N": rows, "BLOCK_K": columns}
    for name, scale in (("ue8m0", BYTES), ("fp32", F32)):
        pointers = {"w": BYTES, "sf": scale, "out": BF16}
        build(f"weight_dequant {name}", kernel, pointers, constants, num_warps=warps)


def compile_products(build, capability: int) -> None:
    import torch

    from vllm_ue8m0.kernels import batched_gemm, gemm, grouped_gemm, sum_parts
    from vllm_ue8m0.kernels.config import FOUR_WARP_MAJORS

    codes = CODES if capability >= 89 else BYTES

    def build_gemm(name, rows, dtype, kernel, pointers, constants, scaled=False, gran=(128, 128)):
        one_warp = capability // 10 not in FOUR_WARP_MAJORS
        config = gemm.tile_config(rows, dtype, gran, scaled, one_warp)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        a = codes if dtype == torch.float8_e4m3fn else BF16
        pointers = {"a": a, "w": codes, "sf": BYTES, "out": BF16, **pointers}
        if a == codes:
            pointers["a_s"] = BYTES
        else:
            constants["a_s"] = None
        flags = {"HAS_C": False, "c": None, "EVEN_K": gran[1] == 128, "QUANTIZED": a == codes}
        grans = {"GRAN_N": gran[0], "GRAN_K": gran[1]}
        build(name, kernel, pointers, {**constants, **flags, **grans, **config}, **options)

    dense = {"bias": None, "HAS_BIAS": False, "GROUP_M": 8}
    for rows in (16, 1024):
        dtype = torch.float8_e4m3fn
        build_gemm(f"gemm {rows}", rows, dtype, gemm._gemm_kernel, {}, dict(dense))
    for rows in (64, 1024):
        build_gemm(f"gemm bf16 {rows}", rows, torch.bfloat16, gemm._gemm_kernel, {}, dict(dense))
    routed = {"order": I64, "tile_expert": I64, "tile_start": I64, "ends": I64}
    routed["slot_weights"] = F32
    kernel, dtype = grouped_gemm._grouped_gemm_kernel, torch.float8_e4m3fn
    for rows in (64, 300, 1000):
        constants = {"HAS_WEIGHTS": True, "GATHER": False}
        build_gemm(f"grouped_gemm {rows}", rows, dtype, kernel, dict(routed), constants)
    kernel = batched_gemm._batched_gemm_kernel
    for rows in (16, 64):
        constants = {"EXPERTS": 32}
        build_gemm(f"batched_gemm {rows}", rows, dtype, kernel, {"counts": I32}, constants)
    if capability // 10 == 10:
        compile_block_scaled(build_gemm, dense, routed)
    pointers = {"slots": BF16, "topk_ids": I64, "out": BF16}
    constants = {"TOPK": 8, "IDS": 8, "BLOCK_N": 1024, "PDL": capability >= 90}
    build("combine", grouped_gemm._combine_kernel, pointers, constants)
    pointers, constants = {"parts": F32, "out": BF16}, {"PARTS": 14, "BLOCK": sum_parts.BLOCK}
    constants["PDL"] = capability >= 90
    build("sum parts", sum_parts._sum_parts_kernel, pointers, constants, num_warps=1)


def compile_block_scaled(build_gemm, dense, routed) -> None:
    """Products of backend sm100: a number of rows for every tile, and scale grids of cut blocks."""
    import torch

    from vllm_ue8m0.kernels import batched_gemm, gemm, grouped_gemm

    grouped = grouped_gemm._grouped_gemm_kernel
    kernels = {
        "gemm": (gemm._gemm_kernel, {}, dense),
        "grouped_gemm": (grouped, routed, {"HAS_WEIGHTS": True, "GATHER": False}),
        "grouped_gemm gathered": (grouped, routed, {"HAS_WEIGHTS": False, "GATHER": True}),
        "batched_gemm": (batched_gemm._batched_gemm_kernel, {"counts": I32}, {"EXPERTS": 32}),
    }
    whole = (128, 128)
    cases = [(name, rows, whole) for rows in (16, 32, 64, 1024) for name in kernels]
    cases += [("gemm", rows, gran) for gran in ((32, 32), (48, 64)) for rows in (16, 1024)]
    for name, rows, gran in cases:
        kernel, pointers, constants = kernels[name]
        title = f"scaled {name} {rows}" + ("" if gran == whole else f" {gran}")
        e4m3, pointers, constants = torch.float8_e4m3fn, dict(pointers), dict(constants)
        build_gemm(title, rows, e4m3, kernel, pointers, constants, scaled=True, gran=gran)


def compile_routing(build) -> None:
    """What sorts slots for the kernels of sm_90."""
    from vllm_ue8m0.kernels import route, route_quant

    rows, experts, topk = 64, 256, 8
    tensors = ("expert_map", "counts", "done", "starts", "destinations", "order", "scale_rows")
    tensors += ("tiles", "num_tiles", "tall_tiles", "num_tall", "progress")
    pointers = dict.fromkeys(tensors, I32) | {"topk_ids": I64}
    tile = {"ROWS": rows, "PITCH": route.scale_pitch(rows), "PDL": True}
    sizes = {**tile, "SLOTS": route.SLOTS}
    for one in (True, False):
        constants = {**sizes, "EXPERTS": experts, "ONE": one}
        constants["TALL_ROWS"] = 128
        name = "route count and place" if one else "route count"
        build(name, route._count_kernel, pointers, constants, num_warps=8)
    build("route place", route._place_kernel, pointers, sizes, num_warps=8)
    constants = {**tile, "EXPERTS": 32, "BLOCK": 128}
    build("batched tiles", route._tiles_kernel, pointers, constants, num_warps=4)
    pointers |= {"x": BF16, "q": BYTES, "s": BYTES}
    kernel, warps = route_quant._route_quant_kernel, route_quant.WARPS
    sizes = {"GROUP": route_quant.GROUP, "FLOOR": 105, "COPIES": topk, "TOPK": topk}
    for tokens in (1, 16, 64):
        constants = {**tile, **sizes, "GROUPS": route_quant.program_groups(tokens)}
        constants |= {"SLOTS": tokens * topk, "EXPERTS": experts}
        build(f"route few slots {tokens}", kernel, pointers, constants, num_warps=warps)


def compile_yardsticks(build) -> None:
    """What benchmarks compare with."""
    from vllm_ue8m0.kernels import copy

    block, warps = copy.CONFIGS[0]
    pointers = {"src": I32, "dst": I32}
    build("copy", copy._copy_kernel, pointers, {"BLOCK": block}, num_warps=warps)
    build("empty", copy._empty_kernel, {"unused": I32}, {}, num_warps=1)


if __name__ == "__main__":
    compiler = Compiler(int(sys.argv[1]))
    compile_quantization(compiler.build, compiler.capability)
    compile_products(compiler.build, compiler.capability)
    compile_yardsticks(compiler.build)
    if compiler.capability == 90:
        compile_routing(compiler.build)
