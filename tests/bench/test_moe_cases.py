"""The routed experts' cases: what is measured, its bytes and flops, and a gate that refuses errors.

On the CPU `reference` stands in for a backend, and layers are small.
"""

from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import agreement, portable, reference
from vllm_ue8m0.bench import MOE_LAYERS, BenchError, gate, moe, routing
from vllm_ue8m0.bench.case import tensor_bytes
from vllm_ue8m0.bench.roof import Roof
from vllm_ue8m0.bench.run import run
from vllm_ue8m0.bench.timing import ROTATION, plan_copies

ALL = moe.cases(reference)
ROOF = Roof(3.0, 1500.0)
LAYER = moe.Layer("TP2", experts=8, local=8, hidden=256, intermediate=192, topk=3)
RANK = moe.Layer("EP4", experts=8, local=2, hidden=256, intermediate=192, topk=3)
H100 = {"l2_bytes": 50 << 20, "free_bytes": 60 << 30}


def make(backend=reference, layer=LAYER, kind="uniform", tokens=5):
    return replace(moe.experts(backend, layer, kind, tokens), peers={})


def draw(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {**case.shared.draw(generator), **case.inputs(generator)}


def measure(case, clock=None):
    (record,) = run([case], clock or FakeClock(), MACHINE, lambda line: None, DEVICE, ROOF)
    return record


def of(name):
    layer, kind = name.split("_")
    return [
        case
        for case in ALL
        if (case.variant["parallel"], case.variant["routing"]) == (layer.upper(), kind)
    ]


def test_every_layer_is_measured_at_every_size():
    few = [1, 8, 32, 128, 512, 2048, 8192]
    for name in MOE_LAYERS:
        sizes = few if name.startswith("tp1") else sorted([*few, 16])
        assert [case.M for case in of(name)] == sizes
        assert moe.cases(reference, [name])[0].variant == of(name)[0].variant
    assert len(ALL) == 3 * 7 + 5 * 8 == len({str(case) for case in ALL})
    assert [case.M for case in moe.cases(reference, quick=True)] == [1, 2048] * 8
    assert {(case.N, case.K, case.single) for case in ALL} == {(None, 7168, False)}
    assert [*ALL[0].peers] == ["vllm_triton", "deepgemm", "vllm_triton_fp32"]


def test_other_tokens():
    found = moe.cases(reference, ["tp8_uniform", "tp1_skewed"], tokens=[48, 96])
    layers = ["TP1 skewed"] * 2 + ["TP8 uniform"] * 2
    assert [f"{c.variant['parallel']} {c.variant['routing']}" for c in found] == layers
    assert [case.M for case in found] == [48, 96] * 2
    assert moe.cases(reference, ["tp8_uniform"], quick=True, tokens=[48])[0].M == 48


def test_layers_of_deepseek():
    sizes = {
        name: [of(name)[0].variant[key] for key in ("experts", "intermediate", "topk")]
        for name in MOE_LAYERS
    }
    expected = {"tp1": [256, 2048, 8], "tp8": [256, 256, 8], "ep8": [32, 2048, 8]}
    assert sizes == {name: expected[name[:3]] for name in MOE_LAYERS}


def test_weights_are_drawn_once_for_a_layer():
    names = [name for name, _ in groupby(case.shared.name for case in ALL)]
    assert len(names) == len(set(names)) == 3  # and not a second time later


def test_bytes_and_flops_by_hand():
    layer = moe.DEEPSEEK["tp1"]
    # codes and scales of one expert: gate and up 4096 x 7168, down 7168 x 2048
    expert = 4096 * 7168 + 32 * 56 + 7168 * 2048 + 56 * 16
    assert layer.num_bytes(1, 8) == 8 * expert + 2 * 2 * 7168 + 8 * (4 + 4)
    assert layer.flops(8) == 2 * 8 * (4096 * 7168 + 7168 * 2048)
    assert moe.DEEPSEEK["tp8"].num_bytes(0, 1) == 512 * 7168 + 4 * 56 + 7168 * 256 + 56 * 2


@pytest.mark.parametrize("layer", [LAYER, RANK], ids=["all", "some"])
def test_work_is_that_of_the_experts_that_were_drawn(layer: moe.Layer):
    case = make(layer=layer)
    inputs = draw(case)
    used = sorted({e for row in inputs["topk_ids"].tolist() for e in row if e >= 0})
    assert 0 < len(used) < 8
    weights = {name: inputs[name][used] for name in ("w13", "sf13", "w2", "sf2")}
    tokens = {name: inputs[name] for name in ("x", "topk_weights", "topk_ids")}
    work = case.work(inputs)
    assert work.num_bytes == sum(map(tensor_bytes, (weights, tokens, case.ours(inputs))))
    slots = int((inputs["topk_ids"] >= 0).sum())
    assert work.flops == 2 * slots * 3 * 192 * 256


def test_a_rank_gets_the_ids_of_all_experts_and_its_own():
    inputs = draw(make(layer=RANK, tokens=50))
    assert inputs["w13"].shape == (2, 384, 256) and inputs["w2"].shape == (2, 256, 192)
    local = inputs["expert_map"][inputs["global_ids"].long()]
    assert torch.equal(local, inputs["topk_ids"])
    assert {-1, 0, 1} == set(local.unique().tolist())
    inputs = draw(make())
    assert "expert_map" not in inputs
    assert torch.equal(inputs["topk_ids"], inputs["global_ids"])


@pytest.mark.parametrize("name", MOE_LAYERS)
def test_calls_in_a_row_read_more_weights_than_l2_holds(name: str):
    """Of an H100, by the routings that a rotation draws; their other inputs are not needed here."""
    for case in of(name):
        parallel, kind = name.split("_")
        layer = moe.DEEPSEEK[parallel]
        footprint = case.num_bytes + 5 * 2 * case.M * 7168
        plan = (case.num_bytes, footprint, *H100.values(), case.min_copies)
        copies, _ = plan_copies(*plan)
        generator = torch.Generator().manual_seed(0)
        drawn = [routing.draw(generator, kind, case.M, 256, 8) for _ in range(copies)]
        ids = routing.local_ids(torch.cat(drawn), layer.local)
        weights = layer.num_bytes(0, routing.active(ids)[1])
        assert weights > ROTATION * H100["l2_bytes"], str(case)
        assert copies >= (20 if case.M <= 128 else 4)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [*((reference, kind) for kind in routing.KINDS), (portable, "uniform")],
)
def test_cases_run(backend, kind: str, poison):
    clock = FakeClock({"ours": 2.0})
    record = measure(make(backend, kind=kind, tokens=2), clock)
    assert (record.bench, record.M, record.N, record.K) == ("moe_layer", 2, None, 256)
    assert (record.ours_us, record.peers_us, record.context_us) == (2.0, {}, {})
    assert record.ours == f"{backend.__name__.rpartition('.')[2]} experts"
    assert record.limit_us == round(record.num_bytes / 3e6, 3)
    assert record.flops == LAYER.flops(6)
    assert record.variant["routing"] == kind
    names, copies, calls = clock.seen[0]
    assert names == ["ours"] and copies == calls >= 20


def test_tokens_without_a_local_expert():
    case = make(layer=RANK, tokens=3)
    inputs = next(
        drawn
        for seed in range(100)
        if (drawn := draw(case, seed))["topk_ids"].amax(-1).sign().tolist() == [1, -1, 1]
    )
    (out,) = case.ours(inputs)
    assert not out[1].any() and case.check(inputs, [out]) is None
    assert case.agree([out], [out.clone()]) is None
    for wrong in (1, torch.nan):
        damaged = out.clone()
        damaged[1, 5] = wrong
        assert "1 of 3 rows differ" in case.check(inputs, [damaged])
        assert "1 of 3 rows differ" in case.agree([out], [damaged])


def test_a_rank_always_has_something_to_do():
    case = make(layer=RANK, tokens=1)
    generator = torch.Generator().manual_seed(0)
    drawn = [case.work(case.inputs(generator)).flops for _ in range(100)]
    assert set(drawn) == {RANK.flops(1), RANK.flops(2)}


def test_a_row_that_is_the_sum_of_fewer_codes_may_differ_by_more():
    ids = torch.tensor([[1, 0, 5, 2], [-1, 3, -1, -1], [-1, -1, -1, -1]])
    allowed = agreement.experts_diff(ids, 2048).tolist()
    assert allowed[0] == pytest.approx(allowed[1] / 4) and allowed[1] == allowed[2]
    assert agreement.experts_diff(ids, 1 << 20).tolist() == [agreement.EXPERTS_DIFF] * 3
    # What one code is at most, as computed there, for 8 experts of 256 and of 2048.
    ids = torch.zeros(1, 8)
    for intermediate, largest in ((256, 2.1e-3), (2048, 4.2e-4)):
        assert largest < float(agreement.experts_diff(ids, intermediate)) < 2 * largest
    want = torch.randn(2, 512)
    got = want * torch.tensor([[1.05], [1.01]])
    assert agreement.rows_differ(want, got, torch.tensor([2e-3, 1e-4])) is None
    found = agreement.rows_differ(want, got, torch.tensor([2e-3, 1e-5]))
    assert "1 of 2 rows" in found and "(allowed: 1e-05)" in found


def wrong_row(out, arguments):
    out[2] = 0


def other_expert(out, arguments):
    ids = arguments[8].clone()
    ids[1, 0] = (ids[1, 0] + 1) % 8
    out.copy_(reference.experts(*arguments[:8], ids, *arguments[9:]))


def weights_forgotten(out, arguments):
    even = torch.full_like(arguments[7], 1 / 3)
    out.copy_(reference.experts(*arguments[:7], even, *arguments[8:]))


def scale_of_a_block(out, arguments):
    sf2 = arguments[5].clone()
    sf2[int(arguments[8][0, 0]), 1, 0] += 1
    out.copy_(reference.experts(*arguments[:5], sf2, *arguments[6:]))


def nan(out, arguments):
    out[0, 0] = torch.nan


@pytest.mark.parametrize(
    "damage", [wrong_row, other_expert, weights_forgotten, scale_of_a_block, nan]
)
def test_the_gate_catches(damage):
    def faulty(*arguments):
        out = reference.experts(*arguments)
        damage(out, arguments)
        return out

    backend = SimpleNamespace(__name__="faulty", experts=faulty)
    clock = FakeClock()
    with pytest.raises(BenchError, match=r"wrong result of faulty experts: .* rows differ"):
        measure(make(backend), clock)
    assert not clock.seen


def test_the_gate_looks_at_some_tokens_of_many():
    seen = []

    def counting(*arguments):
        seen.append(arguments[0].shape[0])
        return reference.experts(*arguments)

    case = make(SimpleNamespace(__name__="counting", experts=counting), tokens=200)
    inputs = draw(case)
    outputs = case.ours(inputs)
    assert case.check(inputs, outputs) is None
    outputs[0][199] = 0  # the last is among them
    assert f"1 of {gate.ROWS} rows differ" in case.check(inputs, outputs)
    assert seen == [200]
