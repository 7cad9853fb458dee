"""The quantizers' cases: what is measured, how many bytes that is, and a gate that refuses errors.

On the CPU `reference` stands in for a backend.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from vllm_ue8m0 import portable, reference
from vllm_ue8m0.bench import QUANT_OPS, quant
from vllm_ue8m0.bench.case import tensor_bytes

ALL = quant.cases(reference)
SMALL = {
    "act_quant": partial(quant.act_quant, M=70, K=640),
    "act_quant fp32": partial(quant.act_quant, M=5, K=300, scale="fp32"),
    "act_quant mn_major": partial(quant.act_quant, M=70, K=640, layout="mn_major"),
    "act_quant packed": partial(quant.act_quant, M=70, K=640, layout="mn_major_packed"),
    "silu_mul_quant": partial(quant.silu_mul_quant, M=70, width=640),
    "silu_mul_quant fp32": partial(quant.silu_mul_quant, M=3, width=256, scale="fp32"),
    "rms_norm_quant": partial(quant.rms_norm_quant, M=70, K=640),
    "rms_norm_quant fp32": partial(quant.rms_norm_quant, M=70, K=640, scale="fp32"),
    "rms_norm_quant alone": partial(quant.rms_norm_quant, M=2, K=640, residual=False),
    "weight_quant": partial(quant.weight_quant, N=384, K=640, scale="ue8m0"),
    "weight_quant fp32": partial(quant.weight_quant, N=128, K=256, scale="fp32"),
    "weight_dequant": partial(quant.weight_dequant, N=384, K=640, scale="ue8m0"),
    "weight_dequant fp32": partial(quant.weight_dequant, N=384, K=640, scale="fp32"),
}


def draw(case, seed=0):
    return case.inputs(torch.Generator().manual_seed(seed))


def find(bench, M, K, **variant):
    (case,) = (
        c for c in ALL
        if (c.bench, c.M, c.K) == (bench, M, K) and variant.items() <= c.variant.items()
    )  # fmt: skip
    return case


def test_every_operator_is_measured():
    counts = {op: sum(case.bench == op for case in ALL) for op in QUANT_OPS}
    assert counts == {
        "act_quant": 22, "silu_mul_quant": 13, "rms_norm_quant": 16, "weight_quant": 2,
        "weight_dequant": 2,
    }  # fmt: skip
    assert len({str(case) for case in ALL}) == len(ALL)


def test_selections():
    quick = quant.cases(reference, quick=True)
    assert [(case.bench, case.M) for case in quick] == [
        *((op, M) for op in QUANT_OPS[:3] for M in (16, 8192)),
        ("weight_quant", None), ("weight_dequant", None),
    ]  # fmt: skip
    only = quant.cases(reference, only=["rms_norm_quant", "weight_quant"], quick=True)
    assert [case.bench for case in only] == ["rms_norm_quant"] * 2 + ["weight_quant"]


@pytest.mark.parametrize(
    ("bench", "M", "K", "variant", "num_bytes"),
    [
        # 2 bytes in and 1 out for each value; 56 groups of 7168
        ("act_quant", 1, 7168, {}, 7168 * 3 + 56),
        ("act_quant", 8192, 7168, {"scale": "ue8m0", "layout": "row_major"}, 176_619_520),
        ("act_quant", 8192, 7168, {"layout": "mn_major"}, 176_619_520),
        ("act_quant", 8192, 7168, {"layout": "mn_major_packed"}, 176_619_520),
        ("act_quant", 8192, 7168, {"scale": "fp32"}, 177_995_776),
        # gate and up in
        ("silu_mul_quant", 16, 2048, {}, 16 * 2048 * 5 + 16 * 16),
        ("silu_mul_quant", 8192, 18432, {"scale": "fp32"}, 8192 * (18432 * 5 + 144 * 4)),
        # x, residual in and out, weight, codes: 2 + 2 + 2 + 2 + 1 bytes at M = 1
        ("rms_norm_quant", 1, 7168, {"residual": True, "scale": "ue8m0"}, 7168 * 9 + 56),
        ("rms_norm_quant", 1, 7168, {"residual": True, "scale": "fp32"}, 7168 * 9 + 224),
        ("rms_norm_quant", 8192, 7168, {"residual": False}, 8192 * (7168 * 3 + 56) + 7168 * 2),
        ("weight_quant", None, 7168, {"scale": "ue8m0"}, 792_739_584),
        ("weight_quant", None, 7168, {"scale": "fp32"}, 792_787_968),
        ("weight_dequant", None, 7168, {"scale": "ue8m0"}, 792_739_584),
    ],
)
def test_bytes_by_hand(bench, M, K, variant, num_bytes):
    assert find(bench, M, K, **variant).num_bytes == num_bytes


def test_masked_bytes_are_those_of_valid_rows():
    (case,) = (case for case in ALL if case.variant.get("masked"))
    assert (case.variant["experts"], case.variant["rows"], case.K) == (32, 1024, 2048)
    assert 10_000 < case.M < 22_000  # about half of 32 * 1024
    # 16 groups: 4 int32 of scales a row; 32 counts of 4 bytes
    assert case.num_bytes == case.M * (4096 * 2 + 2048 + 16) + 128


def test_masked_inputs():
    case = quant.masked_silu_mul_quant(reference, 4, 10, 128)
    first, second = draw(case, 0), draw(case, 1)
    assert first["gate_up"].shape == (4, 10, 256)
    assert int(first["counts"].sum()) == case.M and int(first["counts"].max()) < 10
    assert torch.equal(first["counts"], second["counts"])  # num_bytes holds for every copy
    assert not torch.equal(first["gate_up"], second["gate_up"])


def test_masked_operators_are_told_their_rows():
    options = {}

    def silu_mul_quant(gate_up, **given):
        options.update(given)
        return reference.silu_mul_quant(gate_up, **given)

    backend = SimpleNamespace(__name__="spy", silu_mul_quant=silu_mul_quant)
    case = quant.masked_silu_mul_quant(backend, 4, 10, 128)
    inputs = draw(case)
    case.ours(inputs)
    assert options == {"ue8m0": True, "layout": "mn_major_packed", "counts": inputs["counts"]}


@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_those_of_the_tensors(name):
    case = SMALL[name](reference)
    inputs = draw(case)
    assert case.num_bytes == tensor_bytes(inputs) + tensor_bytes(case.ours(inputs))


@pytest.mark.parametrize("name", SMALL)
def test_the_gate_lets_the_reference_pass(name):
    case = SMALL[name](reference)
    inputs = draw(case)
    outputs = case.ours(inputs)
    assert case.check(inputs, outputs) is None
    assert case.agree(outputs, outputs) is None


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def last_code(outputs):
    bits(outputs[0])[-1, -1] ^= 1


def one_in_a_hundred_codes(outputs):
    bits(outputs[0])[:, ::100] ^= 1


def last_row(outputs):
    bits(outputs[0])[-1] = 0x7F


def last_scale(outputs):
    bits(outputs[1])[-1, -1] += 1


def last_scales(outputs):
    bits(outputs[1])[-1, -3:] += 1


def scales_a_little_off(outputs):
    outputs[1] *= 1 + 2**-10


def nan_scales(outputs):
    outputs[1].fill_(torch.nan)


def row_major_scales(outputs):
    outputs[1] = outputs[1].contiguous().view(torch.uint8)


def no_scales(outputs):
    outputs.pop()


def last_of_the_residual(outputs):
    bits(outputs[2])[-1, -1] ^= 1


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("act_quant", last_code, "1 of 40960 codes differ"),
        ("act_quant", last_scale, "1 of 320 scales differ"),
        ("act_quant", no_scales, "1 results instead of 2"),
        ("act_quant fp32", last_scale, "1 of 15 scales differ"),
        ("act_quant mn_major", last_scale, "1 of 320 scales differ"),
        ("act_quant packed", last_scale, "scales differ"),
        ("act_quant packed", row_major_scales, "scales are torch.uint8 (64, 8) instead of"),
        ("silu_mul_quant", last_row, "640 of 40960 codes differ"),
        ("silu_mul_quant", one_in_a_hundred_codes, "(allowed: 204)"),
        ("silu_mul_quant", last_scales, "3 of 320 scales differ"),
        ("silu_mul_quant fp32", scales_a_little_off, "6 of 6 scales differ"),
        ("rms_norm_quant", last_row, "640 of 40960 codes differ"),
        ("rms_norm_quant", last_of_the_residual, "1 of 40960 residual differ"),
        ("rms_norm_quant fp32", nan_scales, "320 of 320 scales differ"),
        ("weight_quant", last_code, "1 of 131072 codes differ"),
        ("weight_quant fp32", last_scale, "1 of 2 scales differ"),
        ("weight_dequant", last_code, "1 of 131072 weights differ"),
    ],
)
def test_the_gate_catches(name, damage, words):
    def faulty(op, *arguments, **options):
        outputs = getattr(reference, op)(*arguments, **options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
        damage(outputs)
        return outputs[0] if op == "weight_dequant" else outputs

    backend = SimpleNamespace(__name__="faulty", **{op: partial(faulty, op) for op in QUANT_OPS})
    case = SMALL[name](backend)
    inputs = draw(case)
    wrong = case.check(inputs, case.ours(inputs))
    assert wrong is not None and words in wrong, wrong


@pytest.mark.parametrize("name", ["silu_mul_quant", "rms_norm_quant"])
def test_the_gate_allows_for_rounded_exp_and_sums(name):
    case = SMALL[name](reference)
    inputs = draw(case)
    outputs = case.ours(inputs)
    bits(outputs[0])[:, ::256] ^= 1  # 0.47 %
    last_scale(outputs)
    assert case.check(inputs, outputs) is None


def masked_outputs(case, inputs):
    """What a masked operator gives: valid rows as if they were alone, the rest untouched."""
    outputs = reference.silu_mul_quant(inputs["gate_up"].flatten(0, 1), ue8m0=True)
    q, s = (t.unflatten(0, inputs["gate_up"].shape[:2]) for t in outputs)
    q = q.view(torch.uint8).clone()
    s = s.contiguous().view(torch.int32).clone()
    for expert, count in enumerate(inputs["counts"].tolist()):
        q[expert, count:] = 0x7F
        s[expert, count:] = -1
    return [q.view(torch.float8_e4m3fn), s]


def test_the_gate_looks_at_valid_rows_of_a_masked_operator():
    case = quant.masked_silu_mul_quant(reference, 4, 10, 512)
    inputs = draw(case)
    outputs = masked_outputs(case, inputs)
    assert case.check(inputs, outputs) is None
    expert = int(inputs["counts"].argmax())
    last = int(inputs["counts"][expert]) - 1
    bits(outputs[0])[expert, last] = 0x7F  # as if the count were one less
    assert "codes differ" in case.check(inputs, outputs)


def test_peers_have_to_do_the_same_work():
    case = SMALL["silu_mul_quant"](reference)
    outputs = case.ours(draw(case))
    theirs = [outputs[0].clone()]
    bits(theirs[0])[:, ::16] ^= 1
    assert case.agree(outputs, theirs) is None  # 6 %: rounded in another place
    theirs[0] = torch.zeros_like(theirs[0])
    assert "of its codes differ from ours" in case.agree(outputs, theirs)
    assert "codes are torch.float8_e4m3fn (64, 320)" in case.agree(outputs, [theirs[0][:, :320]])


def test_weights_are_timed_without_the_check_that_synchronizes():
    def unchecked(w, ue8m0):
        return reference.weight_quant(w, ue8m0)

    backend = SimpleNamespace(
        __name__="portable", weight_quant=None, weight_quant_unchecked=unchecked
    )
    case = SMALL["weight_quant"](backend)
    inputs = draw(case)
    assert case.check(inputs, case.ours(inputs)) is None
    assert case.implementation == "portable"


def test_records_say_which_configuration_ran():
    wanted = "portable act_quant, tile 1 x 4 groups, 1 warps"
    assert quant.act_quant(portable, 1, 7168).implementation == wanted
    for case in quant.cases(portable):
        assert case.implementation.startswith(f"portable {case.bench}, tile ")
