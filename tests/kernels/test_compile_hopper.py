"""The Gluon kernels compile for sm_90 as they are launched; see test_compile.py.

What is compiled is what `launch` passes for tensors without memory.
"""

import sys
from bisect import bisect_left

import pytest
from offline_compiler import Launches, empty, number, report
from recorded_compilation import check

SHARED_BYTES = 227 * 1024
# Block of rows of a, of w, stages, parts of K; N, K, scales (of a and w, or both), results, c and
# bias.
PREFILL = (
    (256, 128, 4, 1, 7168, 2048, "u8", "bf16", False),
    (256, 128, 4, 1, 7168, 2048, "f32", "bf16", False),
    (256, 128, 4, 1, 7168, 2048, "u8", "f32", True),
    (128, 128, 6, 1, 7168, 2048, "u8", "bf16", True),
    (128, 128, 6, 1, 7168, 2048, "f32", "bf16", False),
    (128, 128, 6, 4, 7168, 2048, "u8", "f32", False),
    (256, 64, 5, 1, 7168, 2048, "u8 f32", "bf16", False),
    (256, 64, 5, 1, 7164, 2048, "f32", "bf16", True),  # rows that the copy engine cannot write
    (128, 64, 8, 1, 7168, 2048, "u8", "bf16", False),
    (128, 64, 8, 2, 7168, 2048, "f32", "bf16", True),
    (128, 32, 10, 1, 7168, 2048, "u8", "bf16", False),
    (128, 32, 10, 8, 512, 7168, "f32", "f32", True),
)
# M, rows of w a tile, warps, stages, parts of K, programs; N, K, scales, results, c and bias;
# whether fused.
DECODE = (
    (1, 64, 4, 3, 1, 132, 7168, 2048, "u8", "bf16", False, True),
    (1, 64, 4, 3, 4, 132, 7168, 2048, "f32", "bf16", True, True),
    (8, 128, 8, 3, 4, 132, 7168, 2048, "u8", "bf16", False, True),
    (16, 64, 4, 2, 4, 132, 7168, 2048, "f32", "bf16", False, True),
    (32, 64, 4, 2, 4, 132, 7168, 2048, "u8", "f32", True, True),
    (64, 64, 4, 2, 4, 132, 7168, 2048, "u8", "bf16", False, True),
    (32, 128, 8, 2, 4, 132, 7168, 2048, "f32", "bf16", False, True),
    (1, 64, 4, 5, 1, 132, 7168, 2048, "u8", "bf16", True, False),
    (8, 128, 8, 4, 4, 132, 7168, 2048, "f32", "bf16", False, False),
    (16, 64, 4, 4, 1, 132, 7168, 2048, "f32", "f32", True, False),
    (16, 64, 4, 4, 4, 132, 7168, 2048, "f32 u8", "bf16", False, False),
    (32, 64, 4, 4, 4, 132, 7168, 2048, "f32", "bf16", True, False),
    (32, 128, 8, 3, 1, 132, 7168, 2048, "u8", "bf16", False, False),
    (64, 64, 4, 3, 1, 132, 7168, 256, "u8", "bf16", False, False),  # stages used once
    (64, 64, 4, 3, 4, 132, 7168, 2048, "f32", "bf16", True, False),
    (64, 128, 8, 2, 4, 132, 7168, 2048, "u8", "f32", False, False),
    (16, 64, 8, 4, 4, 132, 7168, 2048, "u8", "bf16", False, False),  # two warpgroups, 8 tokens each
    (64, 64, 8, 2, 4, 132, 7168, 2048, "u8", "bf16", True, True),
)
# M, N, K of MLA's absorbed products.
BMM = ((1, 512, 128), (16, 512, 128), (64, 512, 128), (1, 128, 512), (16, 128, 512), (32, 128, 512))
# M, E, K of routed experts' gate, by parts of K.
GATE = ((1, 256, 7168), (64, 256, 7168))
FULLEST = 4  # of the configurations by rules, those with the most shared memory
ROWS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)


def configurations():
    """(M, N, K, scales, linear, configuration) of DeepSeek-V3's products, as chosen by rules."""
    from vllm_ue8m0.bench.gemm import SHAPES
    from vllm_ue8m0.kernels import hopper_config as rules

    for N, K in SHAPES:
        for M in ROWS:
            for linear in (False, True):
                if M > rules.MAX_DECODE_ROWS:
                    for splits in {1, rules.prefill_splits(M, N, K, 132)}:
                        yield M, N, K, linear, rules.default_prefill(M, N, K, splits, 132)
                    continue
                for splits in {1, rules.default_splits(N, K, 132)}:
                    fused = linear and rules.worth_fusing(M, K, splits)
                    config = rules.default_decode(M, N, K, splits, fused, 132)
                    yield M, N, K, linear, config


@pytest.mark.parametrize("kernel", ["decode", "prefill", "bmm"])
def test_as_recorded(kernel):
    check(__file__, kernel)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_sm90_products_compile(kernel):
    lines = report(__file__, kernel)
    assert len(lines) == (len(DECODE) + FULLEST if kernel == "decode" else len(PREFILL))
    for name, line in lines.items():
        assert number(line, "bytes spilled") == 0, f"{name}: {line}"
        assert number(line, "shared") <= SHARED_BYTES, f"{name}: {line}"
        rows = name.split()[1]  # columns of the tensor cores' result
        assert f"wgmma.mma_async.sync.aligned.m64n{rows}k32.f32.e4m3.e4m3" in line, name
        assert "cp.async.bulk.tensor" in line, name
        assert "griddepcontrol.wait" in line, name
        assert "griddepcontrol.launch_dependents" in line, name
        quantizes = "activations" in name
        assert ("cvt.rn.satfinite.e4m3x2.f32" in line) == quantizes, name


def test_sm90_batched_products_compile():
    """They start what follows, and fetch weights, before they wait, and MLA's are two in an SM."""
    lines = report(__file__, "bmm")
    assert len(lines) == len(BMM) + len(GATE)
    for name, line in lines.items():
        assert number(line, "bytes spilled") == 0, f"{name}: {line}"
        together = 2 if name.startswith("bmm") else 1
        assert together * number(line, "shared") <= SHARED_BYTES, f"{name}: {line}"
        assert "cp.async.bulk.tensor dependents-before-wait" in line, name
        columns = max(8, int(name.split()[1]))
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16" in line, name


def test_activations_are_loaded_16_bytes_at_a_time():
    """As they are where their row stride is known to be a multiple of 16."""
    lines = report(__file__, "decode").items()
    quantizing = [line for name, line in lines if " activations " in name]
    assert quantizing and all("ld.global.v4.b32" in line for line in quantizing)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_estimates_of_shared_memory_hold(kernel):
    """So that every configuration whose estimate fits does fit."""
    for name, line in report(__file__, kernel).items():
        least, estimate = number(line, "shared"), int(name.rpartition(" ")[2])
        assert least <= estimate <= least + 20 * 1024, f"{name}: {line}"


def test_default_configurations_fit():
    from vllm_ue8m0.kernels import hopper_config as rules

    for M, N, K, _, config in configurations():
        assert config.stages >= 1
        if isinstance(config, rules.DecodeConfig):
            NK = -(-K // 128)
            most = rules.decode_stages(config, NK, SHARED_BYTES)
            assert config.stages <= most, (M, N, K, config)
        else:
            for scale_bytes in (1, 4):
                fitting = rules.prefill_stages(config, scale_bytes)
                assert rules.prefill_bytes(config, scale_bytes, *fitting) <= SHARED_BYTES
            assert rules.prefill_stages(config, 1) == (config.stages, config.block_n)


def operands(M, N, K, scale, result, epilogue):
    groups = -(-K // 128)
    scales = scale.split()
    a_s = empty(groups, -(-M // 16) * 16, dtype=scales[0]).mT[:M]
    sf = empty(-(-N // 128), groups, dtype=scales[-1])
    c, bias = (empty(len(sf)), empty(N, dtype="bf16")) if epilogue else (None, None)
    a, w = empty(M, K, dtype="e4m3"), empty(N, K, dtype="e4m3")
    return a, a_s, w, sf, c, bias, empty(M, N, dtype=result)


def compile_prefill() -> None:
    from vllm_ue8m0.kernels import prefill_gemm
    from vllm_ue8m0.kernels.hopper_config import PrefillConfig, prefill_bytes, prefill_stages

    launches = prefill_gemm._prefill_gemm_kernel = Launches(prefill_gemm._prefill_gemm_kernel)
    cases = [(512, *case[4:], PrefillConfig(*case[:4])) for case in PREFILL]
    for M, *sizes, config in cases:
        tensors = operands(M, *sizes)
        scale_bytes = tensors[1].element_size()
        stages, width = prefill_stages(config, scale_bytes)
        if sizes[3] != "bf16" or sizes[0] % 8:
            width = 0  # stored from registers
        estimate = prefill_bytes(config, scale_bytes, stages, width)
        launches.name = f"prefill {config.block_n} {M} {sizes} {config} {estimate}"
        prefill_gemm.launch(*tensors, config, empty(1 << 16, dtype="i32"), 132)


def compile_decode() -> None:
    from vllm_ue8m0.kernels import decode_gemm
    from vllm_ue8m0.kernels.hopper_config import DecodeConfig, tokens

    launches = decode_gemm._decode_gemm_kernel = Launches(decode_gemm._decode_gemm_kernel)
    cases = []
    for M, block_n, warps, stages, splits, programs, *sizes, fused in DECODE:
        config = DecodeConfig(tokens(M), block_n, stages, splits, programs, fused, warps)
        cases.append((M, *sizes, config))
    defaults = (case for case in configurations() if isinstance(case[4], DecodeConfig))
    chosen = {case[4]: (*case[:3], "u8", "bf16", False, case[4]) for case in defaults}
    fullest = sorted(chosen.values(), key=lambda case: estimated(case[-1], case[2]))
    for M, *sizes, config in cases + fullest[-FULLEST:]:
        a, a_s, w, sf, c, bias, out = operands(M, *sizes)
        if config.fused:
            a, a_s = empty(M, sizes[1], dtype="bf16"), None
        kind = "activations" if config.fused else "codes"
        estimate = estimated(config, sizes[1])
        columns = config.tokens * config.block_n // (16 * config.warps)
        launches.name = f"decode {columns} {M} {kind} {sizes} {config} {estimate}"
        decode_gemm.launch(
            a, a_s, w, sf, c, bias, out, config, empty(1 << 16, dtype="i32"), sizes[2] == "u8", 105
        )


def compile_bmm() -> None:
    from vllm_ue8m0.kernels import decode_bmm
    from vllm_ue8m0.sm90.gate import PART

    launches = decode_bmm._decode_bmm_kernel = Launches(decode_bmm._decode_bmm_kernel)
    for M, N, K in BMM:
        launches.name = f"bmm {M} {N} {K}"
        x, w = empty(M, 128, K, dtype="bf16"), empty(128, N, K, dtype="bf16")
        decode_bmm.launch(x.transpose(0, 1), w, empty(128, M, N, dtype="bf16"))
    for M, E, K in GATE:
        launches.name = f"gate {M} {E} {K}"
        x, w = (empty(rows, K // PART, PART, dtype="bf16").transpose(0, 1) for rows in (M, E))
        decode_bmm.launch(x, w, empty(K // PART, M, E))


def estimated(config, K):
    """Shared memory as hopper_config.decode_stages counts it."""
    from vllm_ue8m0.kernels.hopper_config import decode_stages

    NK, budgets = -(-K // 128), range(1 << 20)
    return bisect_left(budgets, config.stages, key=lambda b: decode_stages(config, NK, b))


if __name__ == "__main__":
    {"decode": compile_decode, "prefill": compile_prefill, "bmm": compile_bmm}[sys.argv[1]]()
