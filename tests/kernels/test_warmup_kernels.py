"""A warm-up launches every kernel that any number of rows does, by Triton's own keys.

In a process without the interpreter; kernels are not compiled, only bound to their arguments.
"""

import sys
from functools import cache

import pytest
from offline_compiler import report, target

GPU = "NVIDIA H100 80GB HBM3"  # there is a table for it
NO_TABLE = "a GPU without a table"
B200 = "NVIDIA B200"  # backend sm100; sm90 elsewhere
# N, K of w; activation scales; dtype of w's; whether an activation comes before; GPU
LINEAR = (
    (2112, 7168, "ue8m0", "u8", False, GPU),
    (7168, 2048, "ue8m0", "u8", False, NO_TABLE),
    (7168, 18432, "ue8m0", "u8", True, GPU),
    (7168, 2048, "ue8m0", "u8", True, NO_TABLE),
    (24576, 1536, "fp32", "f32", False, GPU),
    (4608, 7168, "none", "u8", True, GPU),  # portable
    (2112, 7168, "ue8m0", "u8", True, B200),
    (24576, 1536, "ue8m0", "f32", False, B200),  # portable
)
# experts here, of all; intermediate size, top k; scales; GPU
EXPERTS = (
    (256, 256, 2048, 8, "ue8m0", GPU),
    (32, 256, 2048, 8, "fp32", GPU),
    (256, 256, 256, 8, "none", GPU),  # portable
    (8, 8, 1408, 2, "ue8m0", GPU),
    (60, 60, 1472, 4, "ue8m0", GPU),  # portable
    (60, 60, 1472, 4, "ue8m0", B200),
    (256, 256, 2048, 8, "fp32", B200),  # portable
)
MOST = 9000


@cache
def results():
    return report(__file__)


@pytest.mark.parametrize("number", range(len(LINEAR) + len(EXPERTS)))
def test_every_kernel_is_warmed_up(number):
    found = results()[f"case {number}"]
    missing, launched, launches = (int(word) for word in found.split())
    assert missing == 0, results().get(f"missing {number}")
    assert launched >= 5
    assert launches < 800


@pytest.mark.parametrize("number", range(len(LINEAR)))
def test_norms_and_activations_too(number):
    names, activated = results()[f"names {number}"].split(), LINEAR[number][4]
    assert "_rms_norm_quant_kernel" in names
    assert ("_silu_mul_quant_kernel" in names) == activated


def check(number, operator, seen, rows) -> None:
    """Prints kernels that only `rows` launch, kernels in all, numbers of rows that are tried."""
    representatives = [M for some in operator.representatives().values() for M in some]
    for M in representatives:
        operator.launch(M)
    warm = set(seen)
    for M in rows:
        operator.launch(M)
        if seen - warm:
            print(f"missing {number}: {M} rows: {min(seen - warm)}")
            break
    print(f"case {number}: {len(seen - warm)} {len(warm)} {len(representatives)}")
    print(f"names {number}: {' '.join(sorted({name for name, *_ in seen}))}")
    seen.clear()


def main() -> None:
    import random

    import torch

    from vllm_ue8m0 import sm90, sm100, warmup
    from vllm_ue8m0.kernels import (
        act_quant,
        decode_gemm,
        expert_chain,
        expert_decode,
        expert_prefill,
        gemm,
        grouped_gemm,
        hopper_config,
        prefill_gemm,
        rms_norm_quant,
        route,
        route_quant,
        silu_mul_quant,
    )
    from vllm_ue8m0.sm90 import products

    experts = sys.modules["vllm_ue8m0.sm90.experts"]  # the package's name is the function's
    target(90)
    seen = set()

    class Bound:
        """In place of a kernel: notes what Triton would look it up by."""

        def __init__(self, kernel) -> None:
            self.name, self.binder = kernel.fn.__name__, kernel.create_binder()[-1]

        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **keywords):
            _, specialization, options = self.binder(*arguments, **keywords)
            seen.add((self.name, str(specialization), str(sorted(options.items()))))

    modules = (
        act_quant, decode_gemm, expert_chain, expert_decode, expert_prefill, gemm, grouped_gemm,
        prefill_gemm, rms_norm_quant, route, route_quant, silu_mul_quant,
    )  # fmt: skip
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") and name.endswith("_kernel"):
                setattr(module, name, Bound(value))

    def zeros(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def counters(w, count):
        return zeros(max(count, 64), dtype=torch.int32)

    for module in (experts, products):
        module.counters = counters

    def run_on(gpu):
        backend = sm100 if gpu == B200 else sm90
        warmup._compiling = lambda op, device: backend

    dtypes = {"u8": torch.uint8, "f32": torch.float32}
    random.seed(0)
    rows = [*range(1, 300), *random.sample(range(300, MOST), 200)]
    gran, e4m3 = (128, 128), torch.float8_e4m3fn
    for number, (N, K, scale, sf, activated, gpu) in enumerate(LINEAR):
        for module in (experts, products, hopper_config):
            module.device_of = lambda index, gpu=gpu: (gpu, 132)
        hopper_config.decode_config.cache_clear()
        hopper_config.prefill_config.cache_clear()
        run_on(gpu)
        w, s = zeros(N, K, dtype=e4m3), zeros(-(-N // 128), K // 128, dtype=dtypes[sf])
        layer = w, s, None, None, gran, scale
        check(number, warmup.linear(torch.bfloat16, *layer, MOST, activated), seen, rows)
    for number, (E, num_global, inner, topk, scale, gpu) in enumerate(EXPERTS, len(LINEAR)):
        run_on(gpu)
        w13, w2 = zeros(E, 2 * inner, 512, dtype=e4m3), zeros(E, 512, inner, dtype=e4m3)
        s13 = zeros(E, -(-2 * inner // 128), 4, dtype=torch.uint8)
        s2 = zeros(E, 4, -(-inner // 128), dtype=torch.uint8)
        expert_map = None if num_global == E else zeros(num_global, dtype=torch.int32)
        operator = warmup.experts(
            torch.bfloat16, w13, s13, None, w2, s2, None, gran, gran, scale, topk, torch.int32,
            expert_map, MOST,
        )  # fmt: skip
        check(number, operator, seen, rows)


if __name__ == "__main__":
    sys.exit(main())
