"""Facts are found without a GPU, and what looks like a secret is not among them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_ue8m0 import dispatch
from vllm_ue8m0.doctor import facts


@pytest.fixture(autouse=True)
def fresh():
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def test_kernels_are_those_of_the_dispatch_table(monkeypatch):
    monkeypatch.delenv("UE8M0_BACKEND", raising=False)
    found = facts.collect()
    lines = dispatch.table(found.device).splitlines()
    assert len(found.kernels) == len(lines)
    for kernel, line in zip(found.kernels, lines, strict=True):
        assert line.split()[:3] == [kernel.operator, kernel.backend, kernel.status]
        assert line.endswith(kernel.reason)


def test_a_wrong_backend_is_a_fact(monkeypatch):
    monkeypatch.setenv("UE8M0_BACKEND", "cutlass")
    found = facts.collect()
    assert found.kernels == [] and "'cutlass'; allowed: auto" in found.kernels_error
    assert found.environment["UE8M0_BACKEND"] == "cutlass"


def test_gpus(monkeypatch):
    device = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37,
        shared_memory_per_block_optin=232_448,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = facts.collect()
    assert found.gpus == [facts.Gpu("NVIDIA H200", "sm_90", 132, 232_448, 1 << 37)] * 2
    chosen = {k.operator: k.backend for k in found.kernels if k.status == "chosen"}
    assert chosen["linear"] == "sm90" and chosen["act_quant"] == "portable"


def test_a_gpu_that_does_not_start(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = facts.collect()
    assert found.torch_error == "RuntimeError: CUDA driver initialization failed"
    assert found.device is None and found.gpus == found.kernels == []


def test_environment():
    given = {
        "VLLM_API_KEY": "hunter2", "VLLM_HTTP_TOKEN": "hunter2", "UE8M0_BACKEND": "auto",
        "VLLM_MAX_TOKENS_PER_EXPERT": "8", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/home/me",
        "TRITON_CACHE_DIR": "/tmp/cache",
    }  # fmt: skip
    found = facts.relevant(given)
    assert "hunter2" not in str(found) and "shown" in found["VLLM_API_KEY"]
    expected = {"UE8M0_BACKEND", "VLLM_MAX_TOKENS_PER_EXPERT", "CUDA_VISIBLE_DEVICES"}
    assert {name for name in found if found[name] == given[name]} == {*expected, "TRITON_CACHE_DIR"}
    assert "HOME" not in found


def test_cache_directory():
    assert facts.triton_cache_directory({"TRITON_CACHE_DIR": "/a"}) == Path("/a")
    assert facts.triton_cache_directory({"TRITON_HOME": "/b"}) == Path("/b/.triton/cache")
    assert facts.triton_cache_directory({}) == Path.home() / ".triton/cache"


@pytest.mark.skipif(os.environ.get("TRITON_CACHE_DIR") is not None, reason="the default is asked")
def test_cache_directory_is_tritons():
    knobs = pytest.importorskip("triton").knobs
    assert str(facts.triton_cache_directory(os.environ)) == knobs.cache.dir


def test_cache(tmp_path):
    (tmp_path / "cache/a").mkdir(parents=True)
    (tmp_path / "cache/a/kernel.cubin").write_bytes(b"12345")
    found = facts.look_at(tmp_path / "cache")
    assert found.writable and (found.files, found.num_bytes) == (1, 5) and found.free_bytes > 0
    assert facts.look_at(tmp_path / "not/yet/there").writable
    (tmp_path / "file").touch()
    assert not facts.look_at(tmp_path / "file/cache").writable


def test_compiler(monkeypatch):
    monkeypatch.setattr(facts.shutil, "which", lambda name: None)
    assert not facts.has_compiler({})
    include = {"include": str(Path(__file__).parent)}
    monkeypatch.setattr(facts.sysconfig, "get_paths", lambda: include)
    assert not facts.has_compiler({"CC": "/opt/cc"})  # no Python.h there
