"""The self-test finds wrong, crashing and hanging kernels, and lets right ones pass."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from installations import CPU, CPU_VLLM, HOPPER, HOPPER_VLLM

from vllm_ue8m0 import dispatch, reference
from vllm_ue8m0.cli import main
from vllm_ue8m0.doctor import ask_kernels, report, run_cases
from vllm_ue8m0.doctor.ask_kernels import Checked, ask, to_check
from vllm_ue8m0.doctor.ask_vllm import stock_fp8
from vllm_ue8m0.doctor.cases import cases
from vllm_ue8m0.doctor.facts import Kernel
from vllm_ue8m0.doctor.problems import find

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRODUCTS = dispatch.PRODUCT_OPERATORS


def checked(monkeypatch, operator, change):
    """What is said of a backend whose results are plain torch's, changed."""

    def changed(*args, **options):
        found = getattr(reference, operator)(*args, **options)
        single = isinstance(found, torch.Tensor)
        outputs = [t.clone() for t in ([found] if single else found)]
        outputs = change(outputs)
        return outputs[0] if single else outputs

    backend = SimpleNamespace(name="changed", load=lambda: SimpleNamespace(**{operator: changed}))
    monkeypatch.setattr(run_cases.dispatch, "BACKENDS", (backend,))
    return list(run_cases.check(operator, "changed", "cpu"))


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_the_reference_is_itself(monkeypatch, operator):
    *begun, last = checked(monkeypatch, operator, lambda outputs: outputs)
    assert last == {
        "cases": len(begun), "bitwise": True, "diff": 0.0, "error": None, "no_memory": False,
    }  # fmt: skip
    assert len({line["case"] for line in begun}) == len(begun) >= 4


def flipped(tensor):
    """Another value in the first row, whatever the dtype."""
    bits = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    bits[(0,) * bits.dim()] = bits[(0,) * bits.dim()] * 2 + 8
    return tensor


def first_column(outputs):
    outputs[0][..., 0] = outputs[0][..., 1]
    return outputs


def last_row(outputs):
    flat = outputs[0].view(torch.uint8) if outputs[0].dtype.itemsize == 1 else outputs[0]
    flat[..., -1, :] = 0
    return outputs


def one_nan(outputs):
    value = outputs[0].view(torch.uint8) if outputs[0].dtype.itemsize == 1 else outputs[0]
    value[(0,) * value.dim()] = 0x7F if value.dtype == torch.uint8 else torch.nan
    return outputs


@pytest.mark.parametrize("change", [last_row, first_column, one_nan])
@pytest.mark.parametrize("operator", PRODUCTS)
def test_a_wrong_product_is_found(monkeypatch, operator, change):
    last = checked(monkeypatch, operator, change)[-1]
    assert "rows differ, calc_diff up to" in last["error"] and not last["bitwise"]


@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("operator", ["act_quant", "weight_quant"])
def test_one_wrong_code_or_scale_is_found(monkeypatch, operator, result):
    def change(outputs):
        flipped(outputs[result])
        return outputs

    error = checked(monkeypatch, operator, change)[-1]["error"]
    assert error.startswith("1 of ") and f"{('codes', 'scales')[result]} differ" in error


@pytest.mark.parametrize("operator", ["silu_mul_quant", "rms_norm_quant"])
def test_wrong_rows_of_inexact_quantizers_are_found(monkeypatch, operator):
    assert "codes differ" in checked(monkeypatch, operator, last_row)[-1]["error"]


def test_results_of_another_form_are_found(monkeypatch):
    last = checked(monkeypatch, "gemm", lambda outputs: [outputs[0].float()])[-1]
    assert "torch.float32 (1, 200) instead of torch.bfloat16 (1, 200)" in last["error"]
    last = checked(monkeypatch, "act_quant", lambda outputs: [*outputs, outputs[0]])[-1]
    assert last["error"] == "3 results instead of 2"


def test_rows_that_have_no_value_are_not_compared(monkeypatch):
    def change(outputs):
        if outputs[0].dim() == 3:
            outputs[0][1] = torch.nan  # of the second expert none is used
        return outputs

    assert checked(monkeypatch, "batched_experts", change)[-1]["bitwise"]


def test_cases_are_the_same_every_time():
    for one, other in zip([*cases("gemm")], [*cases("gemm")], strict=True):
        assert torch.equal(one.arguments[0].float(), other.arguments[0].float())


def test_cases_reach_the_kernels_of_sm_90():
    """They are not handed over to portable, and few and many rows are other kernels."""
    pytest.importorskip("triton")
    from vllm_ue8m0 import sm90
    from vllm_ue8m0.kernels.expert_config import experts_config
    from vllm_ue8m0.kernels.hopper_config import MAX_DECODE_ROWS

    rows = {}
    for operator in ("gemm", "linear"):
        for case in cases(operator):
            a, *_, gran, last = case.arguments
            w, sf = case.arguments[2:4] if operator == "gemm" else case.arguments[1:3]
            if gran == (128, 128) and last != "none":
                assert sm90.refusal(a, w, sf, gran) is None, case.text
                rows.setdefault(operator, set()).add(len(a) <= MAX_DECODE_ROWS)
    assert rows == {"gemm": {True, False}, "linear": {True, False}}
    regimes = set()
    for case in cases("experts"):
        x, w13, sf13, _, w2, sf2, _, _, ids, gran13, gran2, kind, _ = case.arguments
        if kind == "none":
            continue
        assert sm90.experts_refusal(x, w13, sf13, w2, sf2, gran13, gran2, kind) is None, case.text
        (M, topk), (E, N, H) = ids.shape, w13.shape
        config = experts_config(M, topk, E, E, H, N // 2, 1, False, 132)
        regimes.add("one token" if config.one_token else "few" if config.chain else "many")
    assert regimes == {"one token", "few", "many"}


def test_what_is_checked():
    """The chosen backend, and what it hands over to; not plain torch, and no refused kernel."""
    assert to_check(HOPPER.kernels) == [
        ("act_quant", "portable"), ("linear", "sm90"), ("linear", "portable"),
    ]  # fmt: skip
    assert to_check(CPU.kernels) == []
    portable_asked_for = [
        Kernel("linear", "sm90", "usable", ""), Kernel("linear", "portable", "chosen", ""),
        Kernel("linear", "reference", "refused", ""),
    ]  # fmt: skip
    assert to_check(portable_asked_for) == [("linear", "portable")]


# Programs in place of run_cases: kernels that are changed before it runs.
CHANGED = """
import os, signal, sys, torch
from vllm_ue8m0 import portable
from vllm_ue8m0.doctor import run_cases
right = portable.weight_dequant
def wrong(w, *args):
    {body}
    return right(w, *args)
portable.weight_dequant = wrong
sys.exit(run_cases.main(sys.argv[1:]))
"""
PAIRS = [("weight_dequant", "portable"), ("weight_quant", "portable")]


def asked(monkeypatch, code, pairs=PAIRS):
    said = []
    monkeypatch.setattr(ask_kernels, "COMMAND", (sys.executable, "-c", code))
    return ask(pairs, said.append), said


def test_kernels_are_right_here(monkeypatch):
    pytest.importorskip("triton")
    found, said = asked(monkeypatch, CHANGED.format(body="print('noise', flush=True)"))
    assert [(c.operator, c.backend, c.error, c.bitwise) for c in found] == [
        (*pair, None, True) for pair in PAIRS
    ]
    assert [c.cases for c in found] == [8, 4]
    assert said == [
        "self-test 1 of 2: weight_dequant on portable",
        "self-test 2 of 2: weight_quant on portable",
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("w = -w", "weights differ from the reference (allowed: 0)"),
        ("raise ValueError('no such\\nlayout')", "ValueError: no such"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with SIGSEGV"),
        ("print('bad luck', file=sys.stderr); os._exit(7)", "ended with status 7: bad luck"),
    ],
)  # fmt: skip
def test_one_bad_kernel_is_named_and_the_others_are_checked(monkeypatch, body, words):
    pytest.importorskip("triton")
    body = body.replace("w = -w", "w = (-w.float()).to(w.dtype)")
    (bad, good), said = asked(monkeypatch, CHANGED.format(body=body))
    assert bad.error.startswith("300x400, torch.uint8 scales, torch.bfloat16: ")
    assert words in bad.error and not bad.no_memory
    assert good.error is None and good.bitwise
    assert said[-1] == "self-test 2 of 2: weight_quant on portable"


def test_no_memory_is_not_a_wrong_kernel(monkeypatch):
    pytest.importorskip("triton")
    body = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')"
    bad, good = asked(monkeypatch, CHANGED.format(body=body))[0]
    assert bad.no_memory and "out of memory" in bad.error and good.error is None


BEGIN = 'import time; print(\'{"operator": "x", "backend": "y", "case": "5 rows"}\', flush=True)'


def test_waiting_ends(monkeypatch):
    monkeypatch.setattr(ask_kernels, "SILENCE_S", 0.5)
    found, _ = asked(monkeypatch, f"{BEGIN}; time.sleep(60)")
    assert [c.error for c in found] == ["5 rows: it took more than 0.5 s"] * 2


def test_a_process_that_never_begins(monkeypatch):
    found, said = asked(monkeypatch, "raise SystemExit('no module')")
    assert [c.error for c in found] == ["the process ended with status 1: no module"] * 2
    assert said == []


def made(facts, vllm, self_test):
    problems = find(facts, vllm, None, self_test or ())
    capability = facts.gpus[0].capability if facts.gpus else None
    return report.Report(facts, vllm, stock_fp8(vllm, capability), None, problems, self_test)


RIGHT = Checked("act_quant", "portable", 12, True)
NEAR = Checked("linear", "sm90", 8, False, 1.2e-6)
WRONG = Checked("experts", "sm90", error="5 tokens: SIGSEGV")


def test_report():
    found = made(HOPPER, HOPPER_VLLM, [RIGHT, NEAR])
    assert found.works
    text = report.text(found)
    assert "self-test     portable, bit for bit as plain torch: act_quant" in text
    assert "sm90, as plain torch up to rounding: linear (1e-06)" in text
    found = made(HOPPER, HOPPER_VLLM, [RIGHT, NEAR, WRONG])
    assert not found.works
    text = report.text(found)
    assert "sm90, FAILED, see below: experts" in text
    assert (
        "BROKEN        the sm90 kernels are wrong on this machine: experts, 5 tokens: SIG" in text
    )
    assert "-> set UE8M0_BACKEND=portable; report it with this output" in text
    assert found.to_json()["self_test"][1] == {
        "operator": "linear", "backend": "sm90", "cases": 8, "bitwise": False, "diff": 1.2e-6,
        "error": None, "no_memory": False,
    }  # fmt: skip


def test_problems():
    portable = replace(WRONG, backend="portable")
    (problem,) = find(HOPPER, HOPPER_VLLM, None, [RIGHT, portable, replace(portable, operator="x")])
    assert "experts, 5 tokens: SIGSEGV; x, 5 tokens" in problem.found and problem.broken
    assert "UE8M0_BACKEND=reference" in problem.do
    (problem,) = find(HOPPER, HOPPER_VLLM, None, [replace(WRONG, no_memory=True)])
    assert not problem.broken and "--no-self-test" in problem.do


def test_nothing_to_compare():
    assert "nothing to compare" in report.text(made(CPU, CPU_VLLM, []))
    assert made(CPU, CPU_VLLM, None).to_json()["self_test"] is None
    assert "self-test     left out" in report.text(made(CPU, CPU_VLLM, None))


def test_command(monkeypatch, capsys):
    monkeypatch.setattr("vllm_ue8m0.doctor.ask_vllm.find_spec", lambda name: None)
    asked_for = []

    def fake(pairs, say):
        asked_for.append(pairs)
        say("self-test 1 of 1")
        return [WRONG]

    monkeypatch.setattr(ask_kernels, "ask", fake)
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["self_test"][0]["error"] == "5 tokens: SIGSEGV"
    assert err == "vllm-ue8m0 doctor: self-test 1 of 1\n"
    assert main(["doctor", "--json", "--no-self-test"]) == 1
    assert json.loads(capsys.readouterr().out)["self_test"] is None and len(asked_for) == 1


@pytest.mark.parametrize("backend", [backend.name for backend in dispatch.BACKENDS[:-1]])
def test_the_next_backend_is_proposed(backend):
    (problem,) = find(HOPPER, HOPPER_VLLM, None, [replace(WRONG, backend=backend)])
    other = "reference: plain torch, slow" if backend == "portable" else "portable"
    assert problem.do == f"set UE8M0_BACKEND={other}; report it with this output"
