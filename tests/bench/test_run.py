"""From a case to a record, with a clock that needs no GPU."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_clock import COPIES, DEVICE, MACHINE, VERSIONS, FakeClock

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.bench import BenchError, quant
from vllm_ue8m0.bench.case import Case, Shared, Work
from vllm_ue8m0.bench.roof import Roof
from vllm_ue8m0.bench.run import run


def measure(case, clock, said=None):
    say = said.append if said is not None else lambda line: None
    (record,) = run([case], clock, MACHINE, say, DEVICE)
    return record


def small_case(backend=reference, M=5, **changes) -> Case:
    case = quant.act_quant(backend, M, 256)
    return Case(**{**case.__dict__, "peers": {}, "context": {}, **changes})


def test_record():
    times = {"ours": 2.00049, "peer theirs": 3.0, "context other": 5.0, "context empty": 1.5}
    times |= dict(zip(COPIES, (4.0, 1.75, 2.0, 3.0), strict=True))
    clock, said = FakeClock(times), []
    case = small_case(peers={"theirs": small_case().ours}, context={"other": lambda inputs: []})
    record = measure(case, clock, said)
    assert (record.bench, record.M, record.N, record.K) == ("act_quant", 5, None, 256)
    assert (record.ours_us, record.limit_us) == (2.0, 1.75)  # the fastest copy
    assert record.peers_us == {"theirs": 3.0}
    assert record.context_us == {
        "other": 5.0,
        "empty": 1.5,
        "empty + ours": 7.0,
        "empty + theirs": 7.0,
    }
    assert record.num_bytes == case.num_bytes
    assert record.ours == "reference"
    assert record.variant == {"scale": "ue8m0", "layout": "row_major", "dtype": "bf16"}
    assert (record.gpu, record.versions, record.date) == ("Test GPU", VERSIONS, "2026-11-22")
    # 5 * (256 * 3 + 2) bytes: a rotation of 3 KiB needs one copy, at least four are made
    after = ["context empty + ours", "context empty + theirs"]
    names = ["ours", "peer theirs", "context other", *COPIES, *after, "context empty"]
    assert clock.seen == [(names, 4, 20)]
    assert said == ["[1/1] act_quant M=5 K=256 ue8m0 row_major"]


@pytest.mark.parametrize(("M", "measured"), [(128, True), (129, False)])
def test_the_empty_kernel_is_beside_small_cases(M: int, measured: bool):
    assert ("empty" in measure(small_case(M=M), FakeClock()).context_us) == measured


def test_every_buffer_is_another():
    seen = set()

    def ours(inputs):
        seen.add(inputs["x"].data_ptr())
        return [*reference.act_quant(inputs["x"], ue8m0=True)]

    measure(small_case(ours=ours), FakeClock())
    assert len(seen) == 2  # the first, checked before, and the last


def test_wrong_results_are_not_timed():
    def act_quant(x, **options):
        q, s = reference.act_quant(x, **options)
        return q, s + 1

    clock = FakeClock()
    case = small_case(SimpleNamespace(__name__="vllm_ue8m0.portable", act_quant=act_quant))
    with pytest.raises(BenchError) as error:
        measure(case, clock)
    assert str(error.value).startswith(
        "act_quant M=5 K=256 ue8m0 row_major: wrong result of portable: 10 of 10 scales differ"
    )
    assert not clock.seen


def refuse(inputs):
    raise RuntimeError("needs another GPU\nand a long story")


def zeros(inputs):
    return [torch.zeros_like(inputs["x"], dtype=torch.float8_e4m3fn)]


@pytest.mark.parametrize(
    ("kind", "operator", "reason"),
    [
        ("peers", refuse, "peer theirs of act_quant is absent: needs another GPU"),
        ("context", refuse, "context theirs of act_quant is absent: needs another GPU"),
        ("peers", zeros, "peer theirs of act_quant is absent: not the same work: "),
    ],
)
def test_absent_peers_are_said_once(kind, operator, reason):
    said, case = [], small_case(**{kind: {"theirs": operator}})
    records = list(run([case, case], FakeClock(), MACHINE, said.append, DEVICE))
    assert [r.peers_us for r in records] == [{}, {}]
    assert [set(r.context_us) for r in records] == [{"empty", "empty + ours"}] * 2
    assert sum(line.startswith(reason) for line in said) == 1
    assert len(said) == 3


def test_context_may_do_other_work():
    record = measure(small_case(context={"theirs": zeros}), FakeClock())
    assert record.context_us["theirs"] == 7.0


def test_the_check_of_a_peer_spoils_no_inputs():
    def in_place(inputs):
        outputs = small_case().ours(inputs)
        inputs["x"].zero_()
        return outputs

    values = []

    class Watch(FakeClock):
        def measure(self, candidates, copies, calls):
            values.append(candidates["ours"](0)[1].max())
            return super().measure(candidates, copies, calls)

    peers = {"first": in_place, "second": in_place}
    assert measure(small_case(peers=peers), Watch()).peers_us == {"first": 7.0, "second": 7.0}
    assert values[0] > 105  # the byte of a group of zeros


def shared_case(name, drawn, M=5):
    """act_quant that also gets a large tensor; `drawn` has what ours and a peer got, by draw."""

    def draw(generator):
        drawn.append((name, []))
        return {"large": torch.rand(1000, generator=generator, device=DEVICE)}

    def ours(inputs):
        drawn[-1][1].append(inputs["large"])
        return small_case().ours(inputs)

    return small_case(M=M, ours=ours, peers={"theirs": ours}, shared=Shared(name, draw))


def test_shared_inputs_are_drawn_once_for_cases_in_a_row():
    drawn = []
    cases = [shared_case(name, drawn, M) for name, M in (("a", 5), ("a", 6), ("b", 5), ("a", 5))]
    for record in run(cases, FakeClock(), MACHINE, lambda line: None, DEVICE):
        assert record.peers_us == {"theirs": 7.0}
    assert [name for name, _ in drawn] == ["a", "b", "a"]
    for _, tensors in drawn:  # the peer gets no copy of it
        assert len({tensor.data_ptr() for tensor in tensors}) == 1
    first, other, again = (tensors[0] for _, tensors in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_shared_inputs_take_no_memory_of_the_rotation():
    class Little(FakeClock):
        def free_bytes(self):
            return 200_000

    def sharing(elements):
        return Shared(str(elements), lambda generator: {"large": torch.empty(elements)})

    clock = Little()
    run_copies = []
    for elements in (1, 1 << 20):
        measure(small_case(shared=sharing(elements)), clock)
        run_copies.append(clock.seen[-1][1:])
    assert run_copies == [(4, 20)] * 2


def test_work_that_depends_on_values_is_the_mean_of_the_calls():
    positive = []

    def work(inputs):
        positive.append(int((inputs["x"] > 0).sum()))
        return Work(3000 * positive[-1], 1000 * positive[-1])

    case = small_case(num_bytes=1, flops=1, work=work, min_copies=24)
    roof = Roof(2.0, 1.0)
    clock = FakeClock()
    (record,) = run([case], clock, MACHINE, lambda line: None, DEVICE, roof)
    (_, copies, calls) = clock.seen[0]
    assert copies == calls == len(positive) == 100  # of so few bytes
    assert len(set(positive)) > 10
    assert record.num_bytes == round(3000 * sum(positive) / 100)
    assert record.flops == round(1000 * sum(positive) / 100)
    assert record.limit_us == round(max(record.num_bytes / 2, record.flops) / 1e6, 3)


def test_calls_that_are_no_multiple_of_the_copies_are_counted():
    amounts = iter(range(1, 8))  # of 7 copies in 20 calls the last is called twice, others thrice
    case = small_case(flops=1, work=lambda inputs: Work(100 * next(amounts), 1), min_copies=7)
    (record,) = run([case], FakeClock(), MACHINE, lambda line: None, DEVICE, Roof(2.0, 1.0))
    assert record.num_bytes == 100 * (3 * (1 + 2 + 3 + 4 + 5 + 6) + 2 * 7) // 20


def test_what_cannot_be_captured():
    error = RuntimeError("operation not permitted when stream is capturing")
    case, said = small_case(peers={"theirs": small_case().ours}), []
    record = measure(case, FakeClock(errors={"peer theirs": error}), said)
    assert record.peers_us == {}
    assert "peer theirs of act_quant is absent: not in a CUDA graph: operation not" in said[1]
    with pytest.raises(BenchError, match=r"act_quant M=5 .*: ours cannot be timed: operation not"):
        measure(case, FakeClock(errors={"ours": error}))


def test_no_memory():
    def ours(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with pytest.raises(BenchError, match=r"act_quant M=5 .*: CUDA out of memory"):
        measure(small_case(ours=ours), FakeClock())


def test_noise_is_said():
    said = []
    measure(small_case(), FakeClock(spread=0.16), said)
    assert said[1] == (
        "warning: act_quant M=5 K=256 ue8m0 row_major: ours: rounds differ by 16% of the median"
    )
    assert not any("copy" in line for line in said)
    said.clear()
    measure(small_case(), FakeClock(spread=0.15), said)
    assert len(said) == 1


@pytest.mark.parametrize(
    "make",
    [
        partial(quant.silu_mul_quant, M=3, width=256),
        partial(quant.masked_silu_mul_quant, experts=3, rows=4, width=256),
        partial(quant.act_quant, M=3, K=256, layout="mn_major"),
        partial(quant.act_quant, M=3, K=256, layout="mn_major_packed"),
        partial(quant.act_quant, M=3, K=256, scale="fp32"),
        partial(quant.rms_norm_quant, M=3, K=256),
        partial(quant.weight_quant, N=128, K=256, scale="fp32"),
        partial(quant.weight_dequant, N=128, K=256, scale="ue8m0"),
    ],
)
@pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
def test_every_operator_runs(make, backend, poison):
    said = []
    record = measure(make(backend), FakeClock(), said)
    assert record.ours_us == 7.0
    assert record.ours.startswith(backend.__name__.removeprefix("vllm_ue8m0."))
    assert all(line.startswith(("[1/1]", "peer", "context")) for line in said)


def test_nothing_that_is_timed_waits_for_the_gpu():
    assert portable.weight_quant_unchecked  # weight_quant does, and could not be captured
