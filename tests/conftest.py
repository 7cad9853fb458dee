"""Without a GPU, Triton kernels run in its interpreter; every test has its own fixed seed.

In parallel (pytest-xdist, as `make test` calls it) a file belongs to one worker: its tests share
what was served or compiled. Every worker, and what it starts, has one thread.
"""

import os
import zlib
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch

# Read when triton is imported, which the tests do later.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_cover(request: pytest.FixtureRequest) -> Iterator[None]:
    """What pytest-cov does for the marked tests themselves, for the processes they start.

    Not by the fixture monkeypatch, which would then be undone after all others.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("no_cover"):
            for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
                patch.delenv(name)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: 0, which is serial, on a GPU, most of whose memory each vLLM takes.

    On a CPU each of them may take 5 GB for a while.
    """
    return 0 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(0x5A)
    return tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns, so that an element that no kernel wrote is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poisoned(empty_like(*a, **k)))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rules for an H100 without a table."""
    from vllm_ue8m0.kernels import hopper_config as rules

    monkeypatch.setattr(rules, "device_of", lambda index: ("a GPU without a table", 132))
    for cached in (rules.decode_config, rules.prefill_config):
        cached.cache_clear()
    yield
    for cached in (rules.decode_config, rules.prefill_config):
        cached.cache_clear()
