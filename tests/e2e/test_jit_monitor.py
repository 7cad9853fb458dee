"""vLLM's JIT monitor hears nothing of our kernels while a model is served."""

import re

import pytest
from harness import FIXTURES, GPU

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]


@pytest.mark.parametrize("eager", [False, True])
def test_nothing_of_ours_is_compiled_while_serving(served, eager):
    prompts = [[256, *range(n % 200, n % 200 + n)] for n in (1, 7, 30)]
    prompts += [[256, *([65, 66, 67] * n)] for n in (25, 43, 90, 201, 300)]
    log = served(
        FIXTURES / "tiny_deepseek", prompts, generate=20, enforce_eager=eager,
        jit_monitor_verbose=True,
    )["log"]  # fmt: skip
    assert "JIT monitor activated" in log and "warm-up: every kernel is ready" in log
    heard = re.findall(r"kernel JIT compilation during inference: (\S+)", log)
    source = "".join(
        path.read_text() for path in FIXTURES.parents[1].glob("vllm_ue8m0/kernels/*.py")
    )
    assert not [name for name in heard if f"def {name.rpartition('.')[2].strip('()')}(" in source]
