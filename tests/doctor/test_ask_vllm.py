"""What vLLM answers, and what follows for its own fp8 method."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from installations import ALL, HOPPER_VLLM

from vllm_ue8m0.doctor import ask_vllm
from vllm_ue8m0.doctor.ask_vllm import Question, Vllm, stock_fp8


def answer(monkeypatch, code):
    """What a probe that runs `code` comes to."""
    popen = subprocess.Popen
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(ask_vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(ask_vllm.subprocess, "Popen", lambda _, **kwargs: popen(command, **kwargs))
    return Question().answer()


def test_the_last_line_counts(monkeypatch):
    found = {"error": None, "platform": "cuda", "registered": True, "deep_gemm": ALL}
    assert answer(monkeypatch, f"print('log'); print({json.dumps(json.dumps(found))})") == Vllm(
        platform="cuda", registered=True, deep_gemm=ALL
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; print('boom', file=sys.stderr); sys.exit(3)", "status 3: boom"),
        ("", "status 0: nothing printed"),
        ("print('{}1')", "status 0: nothing printed"),
        ("import os; print('[]', flush=True); os.abort()", "status -6: nothing printed"),
    ],
)
def test_a_crash_is_an_error(monkeypatch, code, error):
    assert answer(monkeypatch, code).error == f"importing it ended with {error}"


def test_waiting_ends(monkeypatch):
    monkeypatch.setattr(ask_vllm, "TIMEOUT_S", 0.1)
    assert "more than 0.1 s" in answer(monkeypatch, "import time; time.sleep(60)").error


def test_not_installed(monkeypatch):
    monkeypatch.setattr(ask_vllm, "find_spec", lambda name: None)
    assert Question().answer() is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gpu": False, "installed": False, "used": False}, "sm_90, sm_10x and sm_12x"),
        ({"installed": False, "used": False}, "not installed"),
        ({"enabled": False, "used": False}, "VLLM_USE_DEEP_GEMM=0"),
        ({"e8m0_enabled": False, "used": False}, "VLLM_USE_DEEP_GEMM_E8M0=0"),
        ({"used": False}, "no fp8_gemm_nt"),
    ],
)
def test_stock_says_no(asked, words):
    found = stock_fp8(replace(HOPPER_VLLM, deep_gemm={**ALL, **asked}), "sm_90")
    assert found.answer == "no" and words in found.reason


@pytest.mark.parametrize(
    "vllm", [None, Vllm(error="ImportError"), Vllm(), Vllm(deep_gemm={**ALL, "used": None})]
)
def test_stock_is_unknown(vllm):
    assert stock_fp8(vllm, "sm_90").answer == "unknown"


def test_stock_in_part():
    def reason(capability, flashinfer):
        deep_gemm = {**ALL, "flashinfer_below_32": flashinfer}
        found = stock_fp8(replace(HOPPER_VLLM, deep_gemm=deep_gemm), capability)
        assert found.answer == "in part"
        return found.reason

    assert "rows go to FlashInfer" in reason("sm_90", True)
    assert "rows may go to FlashInfer" in reason("sm_90", None)
    assert "FlashInfer" not in reason("sm_90", False) and "measured" in reason("sm_90", False)
    assert "not measured" in reason("sm_100", True) and "32 rows" not in reason("sm_100", True)
