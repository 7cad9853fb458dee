"""Which numbers of rows a warm-up launches, in which order, and what it says; no GPU."""

from contextlib import contextmanager

import pytest
import torch

from vllm_ue8m0 import dispatch, warmup
from vllm_ue8m0.kernels import precompile
from vllm_ue8m0.warmup import Operator


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Four GPUs, of which this rank has the third."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


class Recorded(list):
    """In place of Triton's caches: what would be compiled, noted while `active`."""

    active = False

    def note(self, kernel):
        if kernel not in self:
            self.append(kernel)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    found = Recorded()

    @contextmanager
    def recording():
        found.active = True
        yield found
        found.active = False

    monkeypatch.setattr(precompile, "recording", recording)
    return found


def operator(key, plan, most=5000, launched=None, fail=None, recorded=None):
    """Kernels are by plan and by whether 16 divides the rows."""

    def launch(M):
        if fail is not None:
            raise fail
        if recorded is not None and recorded.active:
            recorded.note((key, plan(M), M % 16 == 0))
        else:
            launched.append((key, M))

    return Operator(key, plan, launch, most)


def test_one_number_of_rows_for_each_plan_and_remainder():
    found = operator("a", lambda M: "few" if M <= 64 else "many").representatives()
    assert found == {"few": [*range(1, 18)], "many": [*range(65, 81)]}
    found = operator("a", lambda M: -(-M // 128) if M > 1024 else 0).representatives()
    assert found[20] == [*range(2433, 2449)] and max(found) == 40
    assert operator("a", lambda M: 0, most=1).representatives() == {0: [1]}
    assert operator("a", lambda M: M, most=3).representatives() == {1: [1], 2: [2], 3: [3]}


@pytest.mark.parametrize("most", [1, 3, 1024, 1025, 1030, 1040, 1041, 5000])
def test_candidates_end_with_the_most_rows(most):
    rows = list(warmup.candidates(most))
    assert rows == sorted(set(rows)) and 1 <= max(rows) <= most
    assert {M % 16 for M in range(1, most + 1)} == {M % 16 for M in rows}
    tiles = {-(-M // 128) for M in range(1, most + 1)}
    assert tiles == {-(-M // 128) for M in rows}


def test_every_kernel_is_launched_once(recorded):
    launched, said = [], []
    more = {"launched": launched, "recorded": recorded}
    layers = [
        operator("a", lambda M: M > 64, 60, **more),
        operator("a", lambda M: M > 64, 200, **more),  # the same shape, in a longer step
        operator("b", lambda M: M > 64, 100, **more),
        operator("c", lambda M: "other", 1, **more),
    ]
    assert warmup.run(layers, said.append) == 9
    rows = {key: [M for k, M in launched if k == key] for key in "abc"}
    assert rows["a"] == rows["b"] == [1, 16, 65, 80] and rows["c"] == [1]
    assert "9 kernels for 3 layer shapes" in said[0] and "every kernel is ready" in said[-1]


def test_what_is_loaded_is_not_launched(recorded):
    launched = []
    recorded.append(("a", 0, False))
    layer = operator("a", lambda M: 0, launched=launched, recorded=recorded)
    warmup.run([layer], lambda line: None)
    assert launched == [("a", 16)]


@pytest.mark.parametrize("cold", [False, True])
def test_the_first_kernel_that_is_compiled_has_all_compiled_ahead(monkeypatch, recorded, cold):
    """From a third of the way on: other ranks begin elsewhere."""
    events, names = [], []

    @contextmanager
    def compilations():
        yield names

    def compile_all(kernels, capability, processes, progress):
        events.append((kernels, capability, processes))
        progress()
        return ["kernel 2: broken"]

    monkeypatch.setattr(precompile, "compilations", compilations)
    monkeypatch.setattr(precompile, "precompile", compile_all)

    def launch(M):
        if recorded.active:
            recorded.note(f"kernel {M}")
            return
        events.append(M)
        if cold and M >= 2:
            names.append("_kernel")

    said = []
    assert warmup.run([Operator("a", lambda M: M, launch, 6)], said.append, processes=5) == 6
    if not cold:
        assert events == [1, 2, 3, 4, 5, 6]
        return
    ahead = [f"kernel {i}" for i in (4, 5, 6, 1, 2, 3)]
    assert events == [1, 2, (ahead, 90, 5), 3, 4, 5, 6]
    assert "6 kernels are compiled, in 5 processes" in said[1]
    assert said[2] == "warm-up: not compiled ahead: kernel 2: broken"


def test_memory_that_is_not_there_is_a_warning(recorded):
    said = []

    def launch(M):
        recorded.note(M)
        raise torch.OutOfMemoryError

    warmup.run([Operator("a", lambda M: 0, launch, 2)], said.append)
    assert "no memory for 1 rows" in said[0] and "every kernel is ready" in said[-1]


def test_other_errors_are_raised():
    with pytest.raises(RuntimeError, match="a kernel"):
        warmup.run([operator("a", lambda M: 0, fail=RuntimeError("a kernel"))], lambda line: None)


def test_long_warm_ups_say_how_far_they_are(monkeypatch, recorded):
    monkeypatch.setattr(warmup, "SAY_SECONDS", 0.0)
    said = []
    warmup.run([operator("a", lambda M: M, 2, [], recorded=recorded)], said.append)
    assert said[1:-1] == [f"warm-up: {done} of 2 launches" for done in (1, 2)]


def test_nothing_is_compiled_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", None)  # not even asked
    w, sf = torch.empty(128, 128, dtype=torch.float8_e4m3fn), torch.empty(1, 1)
    gran = (128, 128)
    assert warmup.linear(torch.bfloat16, w, sf, None, None, gran, "ue8m0", 64) is None
    experts = w[None], sf[None], None, w[None], sf[None], None, gran, gran, "ue8m0", 2
    assert warmup.experts(torch.bfloat16, *experts, torch.int32, None, 64) is None
    said = []
    assert warmup.run([], said.append) == 0 and not said
