"""The parts of a step, from traces as torch's profiler writes them."""

import pytest

from vllm_ue8m0.bench import e2e_split
from vllm_ue8m0.bench.e2e_split import ATTENTION, BF16, EXPERTS, LM_HEAD, REST, SAMPLING


def kernel(name, start, duration, stream=7, correlation=1):
    args = {"stream": stream, "correlation": correlation}
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": args}


def launch(correlation, at):
    event = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at, "dur": 1}
    return {**event, "args": {"correlation": correlation}}


def named_range(part, start, duration):
    return {"cat": "user_annotation", "name": f"ue8m0.{part}", "ts": start, "dur": duration}


TRACE = [
    {"ph": "M", "name": "process_name"},
    launch(1, 0), launch(2, 50), launch(3, 70),
    named_range(LM_HEAD, 45, 10), named_range(SAMPLING, 65, 10),
    {"cat": "user_annotation", "name": "another", "ts": 0, "dur": 100},
    kernel("rms_norm", 100, 2),
    kernel("_act_quant_kernel", 102, 2),
    kernel("_decode_gemm_kernel", 103, 11),  # waits from 103 to 104
    kernel("flash_fwd_mla", 114, 6),
    kernel("nvjet_tst_64x8", 120, 4),
    kernel("per_token_group_quant_8bit", 124, 1),
    kernel("fused_moe_kernel", 125, 20),
    kernel("silu_and_mul", 126, 3, stream=9),  # of the shared experts, beside
    kernel("deep_gemm::sm90_fp8_gemm", 129, 26, stream=9),
    kernel("act_and_mul_kernel", 155, 1),
    kernel("fused_moe_kernel", 156, 10),
    kernel("nvjet_tst_128x8", 170, 30, correlation=2),
    kernel("argmax", 200, 5, correlation=3),
]  # fmt: skip


def test_parts_add_up_to_the_time_in_which_the_gpu_worked():
    found = e2e_split.split({"traceEvents": TRACE}, 1)
    parts = found["parts"]
    assert parts == {
        # quantizer and activation belong with the experts' product behind them
        EXPERTS: 1 + 20 + 1 + 10,
        LM_HEAD: 30,
        ATTENTION: 6,
        SAMPLING: 5,
        BF16: 4,
        # the other stream's product shares 125 to 145 with the experts', which started first
        REST: 2 + 2 + 10 + 0 + 10,
    }
    assert sum(parts.values()) == 205 - 100 - (170 - 166)
    assert found["kernels"][:2] == [
        ["fused_moe_kernel", EXPERTS, 30, 2],
        ["nvjet_tst_128x8", LM_HEAD, 30, 1],
    ]
    halved = e2e_split.split({"traceEvents": TRACE}, 2)
    assert halved["parts"][LM_HEAD] == 15 and halved["kernels"][0][3] == 1


def test_what_was_launched_before_steps_settled_is_left_out():
    """It may have run afterwards: the host is ahead of the GPU."""
    settled = {"cat": "user_annotation", "name": e2e_split.SETTLED, "ts": 60, "dur": 1}
    found = e2e_split.split({"traceEvents": [*TRACE, settled]}, 1)["parts"]
    assert found == {**dict.fromkeys(found, 0), SAMPLING: 5}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_expert_decode_kernel", EXPERTS),
        ("_expert_chain_kernel", EXPERTS),
        ("_expert_prefill_kernel", EXPERTS),
        ("_route_quant_kernel", EXPERTS),
        ("_count_kernel", EXPERTS),
        ("_combine_kernel", EXPERTS),
        ("void vllm::moe::moe_align_block_size_kernel<int>", EXPERTS),
        ("flash::flash_fwd_splitkv_mla_combine_kernel", ATTENTION),
        ("vllm::concat_and_cache_mla_kernel", ATTENTION),
        ("void router_gemm_kernel_bf16_output", BF16),
        ("_decode_bmm_kernel", BF16),
        ("_sum_parts_kernel", BF16),
        ("_act_quant_kernel", None),
        ("void vllm::rms_norm_per_block_quant_kernel", None),
        ("_decode_gemm_kernel", REST),
        ("_prefill_gemm_kernel", REST),
        ("triton_red_fused_add_rms_norm", REST),
    ],
)
def test_names(name, part):
    assert e2e_split.part_of(name) == part


def test_our_kernels_are_known():
    """Every kernel of routed experts is, by its name in the source."""
    from pathlib import Path

    import vllm_ue8m0

    folder = Path(vllm_ue8m0.__file__).parent / "kernels"
    found = set()
    for pattern in ("expert_*", "route", "route_quant", "grouped_gemm"):
        for file in folder.glob(f"{pattern}.py"):
            lines = file.read_text().splitlines()
            names = [line.split()[1].split("(")[0] for line in lines if line.startswith("def _")]
            kernels = [name for name in names if name.endswith("_kernel")]
            assert {e2e_split.part_of(name) for name in kernels} <= {EXPERTS}, file
            found |= {*kernels}
    experts = {f"_expert_{name}_kernel" for name in ("chain", "decode", "prefill")}
    sorting = {f"_{name}_kernel" for name in ("count", "place", "tiles", "route_quant", "combine")}
    assert found == {*experts, *sorting, "_grouped_gemm_kernel"}


def test_nothing_ran():
    assert set(e2e_split.split({"traceEvents": []}, 8)["parts"].values()) == {0.0}
