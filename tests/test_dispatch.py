"""The backend that is chosen, and that nothing falls from a GPU to the CPU's in silence."""

import pytest
import torch

from vllm_ue8m0 import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("UE8M0_BACKEND", raising=False)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_cpu_takes_the_reference():
    assert dispatch.choose("linear", "cpu").name == "reference"
    lines = [line.split()[:3] for line in dispatch.table("cpu").splitlines()]
    assert ["linear", "reference", "chosen"] in lines and ["linear", "portable", "refused"] in lines
    assert {line[0] for line in lines} == set(dispatch.OPERATORS)


def test_gpu_takes_triton(monkeypatch):
    gpu(monkeypatch, (8, 9))
    assert dispatch.choose("linear", "cuda").name == "portable"


def test_hopper_takes_its_own_products_and_portable_for_the_rest(monkeypatch):
    gpu(monkeypatch, (9, 0))
    for wanted in ("auto", "sm90"):
        monkeypatch.setenv("UE8M0_BACKEND", wanted)
        dispatch.choose.cache_clear()
        chosen = {op: dispatch.choose(op, "cuda").name for op in dispatch.OPERATORS}
        its_own = {op for op, name in chosen.items() if name == "sm90"}
        assert its_own == {"gemm", "linear", "experts", "batched_experts"}
        assert set(chosen.values()) == {"sm90", "portable"}
    gpu(monkeypatch, (8, 9))
    dispatch.choose.cache_clear()
    with pytest.raises(RuntimeError, match="sm90: needs sm_90, this GPU is sm_89"):
        dispatch.choose("gemm", "cuda")


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_data_center_blackwell_takes_its_own_products(monkeypatch, capability):
    gpu(monkeypatch, capability)
    for wanted in ("auto", "sm100", "portable"):
        monkeypatch.setenv("UE8M0_BACKEND", wanted)
        dispatch.choose.cache_clear()
        chosen = {op: dispatch.choose(op, "cuda").name for op in dispatch.OPERATORS}
        its_own = {op for op, name in chosen.items() if name == "sm100"}
        assert its_own == (set() if wanted == "portable" else set(dispatch.PRODUCT_OPERATORS))
        assert set(chosen.values()) <= {"sm100", "portable"}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (11, 0), (12, 0)])
def test_other_gpus_do_not_scale_in_the_tensor_cores(monkeypatch, capability):
    """sm_120 has block scaling too, but products without it serve there."""
    gpu(monkeypatch, capability)
    assert dispatch.choose("linear", "cuda").name != "sm100"
    monkeypatch.setenv("UE8M0_BACKEND", "sm100")
    dispatch.choose.cache_clear()
    name = "sm_{}{}".format(*capability)
    with pytest.raises(RuntimeError, match=f"sm100: needs sm_100 or sm_103, this GPU is {name}"):
        dispatch.choose("linear", "cuda")
    assert dispatch.choose("act_quant", "cuda").name == "portable"


def test_hopper_with_an_older_triton_takes_portable(monkeypatch):
    def missing(name, package):
        raise ImportError("cannot import name 'mbarrier'")

    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(dispatch, "import_module", missing)
    assert dispatch.choose("linear", "cuda").name == "portable"
    assert "triton 3.6 or newer: cannot import name 'mbarrier'" in dispatch.table("cuda")


def test_old_gpu_is_refused_with_every_reason(monkeypatch):
    gpu(monkeypatch, (7, 5))
    reasons = r"sm90: needs sm_90.*sm_75; portable: needs sm_80.*sm_75; reference: .*silently"
    with pytest.raises(RuntimeError, match=reasons):
        dispatch.choose("linear", "cuda")


def test_every_operator_starts_at_sm_80(monkeypatch):
    gpu(monkeypatch, (8, 0))
    for op in dispatch.OPERATORS:
        assert dispatch.choose(op, "cuda").name == "portable"
    gpu(monkeypatch, (7, 5))
    dispatch.choose.cache_clear()
    with pytest.raises(RuntimeError, match=r"act_quant .*needs sm_80 or newer, this GPU is sm_75"):
        dispatch.choose("act_quant", "cuda")


def test_every_backend_has_every_operator():
    for backend in dispatch.BACKENDS:
        its_own = backend.name in ("sm90", "sm100")
        assert backend.operators == (dispatch.PRODUCT_OPERATORS if its_own else dispatch.OPERATORS)
        if backend.name != "sm90":  # needs Gluon, which the interpreter does not run
            assert all(callable(getattr(backend.load(), op)) for op in backend.operators)


def test_gpu_without_triton_does_not_fall_back(monkeypatch):
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.choose("linear", "cuda")


def test_named_backend_is_that_or_an_error(monkeypatch):
    monkeypatch.setenv("UE8M0_BACKEND", "reference")
    gpu(monkeypatch, (9, 0))
    assert dispatch.choose("linear", "cuda").name == "reference"
    dispatch.choose.cache_clear()
    monkeypatch.setenv("UE8M0_BACKEND", "portable")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="only in its interpreter"):
        dispatch.choose("linear", "cpu")
    monkeypatch.setenv("UE8M0_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="allowed: auto, sm100, sm90, portable, reference"):
        dispatch.choose("linear", "cuda")
