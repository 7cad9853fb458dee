"""`vllm-ue8m0 doctor` where these tests run: nothing is broken, and vLLM knows the method."""

import json

import pytest
from harness import FIXTURES, GPU, run_vllm

pytestmark = pytest.mark.vllm


def test_doctor():
    command = ["-m", "vllm_ue8m0.cli", "doctor", "--json", FIXTURES / "tiny_deepseek"]
    found = json.loads(run_vllm(*command, stdout_only=True))  # status 0: it works
    assert found["works"] and found["vllm"]["registered"] and found["entry_point"]
    assert found["vllm"]["platform"] == found["device"] == ("cuda" if GPU else "cpu")
    assert set(found["vllm"]["deep_gemm"]) >= {"gpu", "used"}
    assert None not in found["vllm"]["deep_gemm"].values()
    assert [one for one in found["self_test"] if one["error"]] == []
    assert len(found["self_test"]) >= 9 if GPU else found["self_test"] == []
    if not GPU:
        assert found["stock_fp8"]["answer"] == "no"
        assert {k["backend"] for k in found["kernels"] if k["status"] == "chosen"} == {"reference"}
