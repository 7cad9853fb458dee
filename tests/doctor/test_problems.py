"""Every known-bad combination is found, named, and goes with what to do."""

from dataclasses import replace

import pytest
from installations import CACHE, CPU, CPU_VLLM, HOPPER, HOPPER_VLLM

from vllm_ue8m0.doctor.ask_vllm import Vllm
from vllm_ue8m0.doctor.facts import Kernel
from vllm_ue8m0.doctor.model import Model
from vllm_ue8m0.doctor.problems import CHECKS, find


def test_nothing_is_wrong_with_a_good_installation():
    assert find(HOPPER, HOPPER_VLLM, None) == []
    assert find(CPU, CPU_VLLM, None) == []
    assert find(CPU, CPU_VLLM, Model("DIR", [], "ue8m0", "bfloat16")) == []


def kernels(*outcomes):
    return [Kernel(op, "portable", status, "needs sm_80") for op, status in outcomes]


NO_TORCH = replace(CPU, torch_error="ImportError: libcudart.so.13", device=None, kernels=[])
NO_GPU = replace(HOPPER, device="cpu", gpus=[], kernels=CPU.kernels)
OLD = kernels(("act_quant", "chosen"), ("gemm", "refused"), ("linear", "refused"))
FULL = replace(CACHE, free_bytes=400_000_000)
# check -> (facts, vllm, words of what is found, words of what to do, broken)
CASES = {
    "torch_broken": (NO_TORCH, CPU_VLLM, "libcudart", "install it again", True),
    "torch_without_the_gpu": (
        replace(CPU, versions={**CPU.versions, "driver": "580"}),
        CPU_VLLM,
        "2.13.0+cpu is a CPU build",
        "vllm_ue8m0[cuda]",
        True,
    ),
    "vllm_missing": (HOPPER, None, "vLLM is not installed", "vllm_ue8m0[cuda]", True),
    "torchvision_of_another_torch": (
        replace(CPU, distributions={**CPU.distributions, "torchvision": "0.29.0"}),
        CPU_VLLM,
        "torchvision::nms",
        "pip uninstall torchvision",
        True,
    ),
    "vllm_cpu_build": (
        replace(CPU, distributions={**CPU.distributions, "vllm": None}),
        CPU_VLLM,
        "No package metadata was found for vllm",
        "tools/setup.sh",
        True,
    ),
    "vllm_broken": (HOPPER, Vllm(error="ImportError: x"), "ImportError: x", "import vllm", True),
    "vllm_untested": (
        HOPPER, replace(HOPPER_VLLM, warning="0.34 is new"), "0.34 is new", "tested", False,
    ),
    "vllm_for_another_device": (HOPPER, CPU_VLLM, "'cpu', torch for 'cuda'", "vllm-cpu", True),
    "plugin_not_loaded": (
        replace(HOPPER, entry_point=False), HOPPER_VLLM, "entry point", "pip", True,
    ),
    "backend_misnamed": (
        replace(HOPPER, kernels=[], kernels_error="UE8M0_BACKEND is 'cutlass'"),
        HOPPER_VLLM,
        "'cutlass'",
        "unset it",
        True,
    ),
    "no_kernel": (
        replace(HOPPER, kernels=OLD),
        HOPPER_VLLM,
        "no kernel for gemm, linear: portable: needs sm_80",
        "UE8M0_BACKEND=reference",
        True,
    ),
    "slow_backend": (
        replace(HOPPER, environment={"UE8M0_BACKEND": "reference"}),
        HOPPER_VLLM,
        "slowly",
        "unset",
        False,
    ),
    "interpreter": (
        replace(HOPPER, environment={"TRITON_INTERPRET": "1"}),
        HOPPER_VLLM,
        "TRITON_INTERPRET=1",
        "unset",
        True,
    ),
    "no_compiler": (replace(HOPPER, compiler=False), HOPPER_VLLM, "compiler", "gcc", True),
    "cache_unusable": (
        replace(HOPPER, triton_cache=replace(CACHE, writable=False)),
        HOPPER_VLLM,
        "cannot be written",
        "TRITON_CACHE_DIR",
        True,
    ),
    "unknown_variables": (
        replace(HOPPER, environment={"UE8M0_BACKENDS": "sm90"}),
        HOPPER_VLLM,
        "UE8M0_BACKENDS",
        "UE8M0_BACKEND",
        False,
    ),
}  # fmt: skip


def test_every_check_has_a_case():
    assert [check.__name__ for check in CHECKS] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_combination(name):
    facts, vllm, found, do, broken = CASES[name]
    check = next(check for check in CHECKS if check.__name__ == name)
    (problem,) = check(facts, vllm)
    assert found in problem.found and do in problem.do and problem.broken == broken
    assert problem in find(facts, vllm, None)


@pytest.mark.parametrize(
    ("facts", "vllm", "words"),
    [
        (NO_GPU, replace(CPU_VLLM, platform=""), "torch for CUDA 13.0 sees no GPU"),
        (NO_GPU, replace(CPU_VLLM, platform=""), "takes this machine for 'no device'"),
        (replace(HOPPER, environment={"VLLM_PLUGINS": "lora"}), HOPPER_VLLM, "leaves the plugin"),
        (HOPPER, replace(HOPPER_VLLM, registered=False, registration_error="E: x"), "ue8m0: E: x"),
        (
            replace(CPU, distributions={**CPU.distributions, "vllm": "0.33.0"}),
            CPU_VLLM,
            "over each other's files",
        ),
        (
            replace(
                CPU,
                environment={"UE8M0_BACKEND": "portable"},
                kernels=[
                    Kernel("linear", "sm90", "refused", "x"),
                    Kernel("linear", "portable", "refused", "y"),
                    Kernel("linear", "reference", "usable", "plain torch"),
                ],
            ),
            CPU_VLLM,
            "no kernel for linear: portable: y",
        ),
        (replace(HOPPER, triton_cache=FULL), HOPPER_VLLM, "0.4 GB are free"),
    ],
)
def test_other_words(facts, vllm, words):
    (found,) = (p.found for p in find(facts, vllm, None) if words in p.found)
    assert "plain torch" not in found


@pytest.mark.parametrize(
    ("facts", "vllm"),
    [
        # What only a GPU needs is no problem without one.
        (replace(CPU, compiler=False, triton_cache=replace(CACHE, writable=False)), CPU_VLLM),
        (replace(CPU, environment={"TRITON_INTERPRET": "1", "VLLM_PLUGINS": "a,ue8m0"}), CPU_VLLM),
        (replace(CPU, distributions={**CPU.distributions, "torchvision": "0.29+cpu"}), CPU_VLLM),
        (HOPPER, replace(HOPPER_VLLM, deep_gemm={})),
    ],
)
def test_no_false_alarm(facts, vllm):
    assert find(facts, vllm, None) == []


def test_model():
    refused = Model("DIR", ["config.json has no quantization_config"])
    half = Model("DIR", [], "ue8m0", "float16")
    (problem,) = find(CPU, CPU_VLLM, refused)
    assert "DIR: config.json has" in problem.found and problem.do == "vllm-ue8m0 inspect DIR"
    (problem,) = find(CPU, CPU_VLLM, half)
    assert "float16" in problem.found and "--dtype bfloat16" in problem.do and problem.broken
