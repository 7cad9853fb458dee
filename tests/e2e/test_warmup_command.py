"""`vllm-ue8m0 warmup`: vLLM starts once, with the options of a server."""

import pytest
from harness import FIXTURES, GPU, SMALL_OPTIONS, run_vllm

from vllm_ue8m0.cli import main, parse

MODEL = str(FIXTURES / "tiny_deepseek")
pytestmark = pytest.mark.vllm
CLI = ("-m", "vllm_ue8m0.cli", "warmup")


def test_options_are_vllms():
    options = parse(["warmup", MODEL, "--tensor-parallel-size", "2", "--enforce-eager"])
    assert options.model == MODEL
    assert options.engine == ["--tensor-parallel-size", "2", "--enforce-eager"]


def test_a_model_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    options = ["--enforce-eager", "--max-model-len", 128, "--load-format", "dummy", *SMALL_OPTIONS]
    out = run_vllm(*CLI, MODEL, *options)
    assert f"{MODEL} is warmed up, " in out and f"\n  {tmp_path}\n" in out
    assert ("linear layers (reference backend)" in out) != GPU
    assert ("warm-up:" in out) == GPU


@pytest.mark.parametrize(
    ("model", "option", "reason"),
    [
        (MODEL, ["--no-such-option"], "options for vLLM, which are those of `vllm serve`: "),
        ("no/such/model", [], "before no/such/model was ready; see above"),
    ],
)
def test_errors(capfd, model, option, reason):
    assert main(["warmup", model, *option]) == 1
    error = capfd.readouterr().err
    assert f"vllm-ue8m0 warmup: {reason}" in error or reason in error
