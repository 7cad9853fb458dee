"""After a warm-up nothing is compiled, nor read from Triton's cache: vLLM's monitor counts both.

What is launched afterwards is what a server launches: torch.ops, with other tensors.
"""

import os
import random
import subprocess
import sys

import pytest
import torch
from checks import random_codes, random_scale

from vllm_ue8m0 import library, warmup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MOST = 4096
GRAN = (128, 128)
BF16 = torch.bfloat16


def weight(N, K, dtype):
    w = random_codes(N, K, device="cuda")
    return w, random_scale(-(-N // 128), -(-K // 128), dtype=dtype, device="cuda")


def expert_weights(E, H, inner, dtype, gran=128):
    """gran: of scales along the intermediate size."""
    w13, w2 = (random_codes(E, *s, device="cuda") for s in ((2 * inner, H), (H, inner)))
    sf13 = random_scale(E, 2 * inner // gran, H // 128, dtype=dtype, device="cuda")
    return w13, sf13, w2, random_scale(E, H // 128, inner // gran, dtype=dtype, device="cuda")


@pytest.fixture
def compiled():
    """Names of the kernels that were looked up for the first time."""
    from triton import knobs

    names, before = [], knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **event: names.append(event["fn"].name)
    yield names
    knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize("scale", ["ue8m0", "fp32", "none"])
def test_linear(compiled, scale):
    sf_dtype = torch.float32 if scale == "fp32" else torch.uint8
    layers = [(2112, 7168), (7168, 2048), (1536, 512)]
    weights = [weight(N, K, sf_dtype) for N, K in layers]
    operators = [warmup.linear(BF16, w, sf, None, None, GRAN, scale, MOST) for w, sf in weights]
    warmup.run(operators, print)
    assert compiled  # the hook hears
    compiled.clear()
    for (_, K), (w, sf) in zip(layers, weights, strict=True):
        for M in (*range(1, 130), *random.Random(0).sample(range(130, MOST + 1), 200), MOST):
            library.OPS.linear(
                torch.randn(M, K, dtype=BF16, device="cuda"), w, sf, None, None, GRAN, scale
            )
            assert not compiled, f"{M} rows of {K}"


@pytest.mark.parametrize("local", [32, 8])
@pytest.mark.parametrize("inner", [256, 192])  # 192: portable's kernels
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
def test_experts(compiled, local, inner, scale):
    E, H, topk, gran = 32, 1024, 4, 128 if inner % 128 == 0 else 64
    sf_dtype = torch.uint8 if scale == "ue8m0" else torch.float32
    w13, sf13, w2, sf2 = expert_weights(local, H, inner, sf_dtype, gran)
    gran13, gran2 = (gran, 128), (128, gran)
    expert_map = None
    if local < E:
        expert_map = torch.full((E,), -1, dtype=torch.int32, device="cuda")
        expert_map[8 : 8 + local] = torch.arange(local, dtype=torch.int32, device="cuda")
    operator = warmup.experts(
        BF16, w13, sf13, None, w2, sf2, None, gran13, gran2, scale, topk, torch.int32,
        expert_map, MOST,
    )  # fmt: skip
    warmup.run([operator], print)
    compiled.clear()
    for M in (*range(1, 70), *random.Random(0).sample(range(70, MOST + 1), 100), MOST):
        ids = torch.rand(M, E, device="cuda").argsort(1)[:, :topk].to(torch.int32)
        library.OPS.experts(
            torch.empty(M, H, dtype=BF16, device="cuda"),
            torch.randn(M, H, dtype=BF16, device="cuda"), w13, sf13, None, w2, sf2, None,
            torch.rand(M, topk, device="cuda"), ids.contiguous(), gran13, gran2, scale, False,
            expert_map,
        )  # fmt: skip
        assert not compiled, f"{M} tokens"


def test_a_warm_cache_costs_little(tmp_path):
    """The second process reads from disk what the first one compiled."""
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    cold, warm = (
        float(
            subprocess.run(
                [sys.executable, __file__], env=env, capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for _ in range(2)
    )
    print(f"cold {cold:.1f} s, warm {warm:.1f} s")
    assert warm < min(2.0, cold / 2)


def main() -> None:
    import time

    shapes = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]
    weights = [weight(N, K, torch.uint8) for N, K in shapes]
    operators = [warmup.linear(BF16, w, sf, None, None, GRAN, "ue8m0", 8192) for w, sf in weights]
    w13, sf13, w2, sf2 = expert_weights(32, 7168, 2048, torch.uint8)
    operators.append(
        warmup.experts(
            BF16, w13, sf13, None, w2, sf2, None, GRAN, GRAN, "ue8m0", 8, torch.int32, None, 8192
        )
    )
    begun = time.monotonic()
    warmup.run(operators, print)
    print(time.monotonic() - begun)


if __name__ == "__main__":
    main()
