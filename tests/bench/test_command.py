"""`bench quant`, `gemm` and `moe` from the command line to their files; the clock needs no GPU."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import dispatch, reference
from vllm_ue8m0.bench import gemm, machine, moe, quant, records, roof, run, table, timing
from vllm_ue8m0.cli import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """A machine with a GPU, whose benchmark has two small cases; holds what was asked of it."""
    asked = []

    def cases(backend, only, quick):
        asked.append((backend, only, quick))
        return [quant.act_quant(backend, 3, 256), quant.weight_quant(backend, 128, 256, "ue8m0")]

    def products(gemm_backend, linear_backend, only, quick, shapes):
        asked.append((gemm_backend, linear_backend, only, quick, shapes))
        cases = (
            gemm.gemm(gemm_backend, "prefill_gemm", 3, 128, 256),
            gemm.linear(linear_backend, 2, 128, 256),
        )
        return [replace(case, peers={}, context={}) for case in cases]  # some compile for minutes

    def layers(backend, only, quick, tokens):
        asked.append((backend, only, quick, tokens))
        layer = moe.Layer("TP2", 4, 4, 256, 128, 2)
        cases = [moe.experts(backend, layer, "uniform", tokens) for tokens in (1, 2, 5)]
        return [replace(case, peers={}) for case in cases]

    class Reference:
        def load(self):
            return reference

    monkeypatch.setattr(machine, "require_gpu", lambda: None)
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    monkeypatch.setattr(dispatch, "choose", lambda op, device: Reference())
    monkeypatch.setattr(timing, "CudaClock", FakeClock)
    monkeypatch.setattr(run, "run", partial(run.run, device=DEVICE))
    monkeypatch.setattr(quant, "cases", cases)
    monkeypatch.setattr(gemm, "cases", products)
    monkeypatch.setattr(moe, "cases", layers)
    monkeypatch.setattr(roof, "measure", lambda clock: roof.Roof(3.0, 1500.0))
    return asked


def test_quant(asked: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "results.jsonl", tmp_path / "results.svg"
    arguments = ["--quick", "--only", "act_quant", "weight_quant"]
    arguments += ["--out", str(out), "--plot", str(picture)]
    assert main(["bench", "quant", *arguments]) == 0
    assert asked == [(reference, ["act_quant", "weight_quant"], True)]
    measured = records.read(out)
    assert [(r.bench, r.M, r.N) for r in measured] == [
        ("act_quant", 3, None),
        ("weight_quant", None, 128),
    ]
    captured = capsys.readouterr()
    assert captured.out == table.render(measured) + "\n"
    assert "[1/2] act_quant M=3 K=256" in captured.err and "[2/2] weight_quant" in captured.err
    assert "act_quant, all cases" in picture.read_text()
    assert set(tmp_path.iterdir()) == {out, picture}


def test_gemm(asked: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "results.jsonl", tmp_path / "results.svg"
    arguments = ["--only", "decode_linear", "--shape", "128,256", "7168,2048"]
    arguments += ["--out", str(out), "--plot", str(picture)]
    assert main(["bench", "gemm", *arguments]) == 0
    shapes = [(128, 256), (7168, 2048)]
    assert asked == [(reference, reference, ["decode_linear"], False, shapes)]
    measured = records.read(out)
    assert [(r.bench, r.M, r.N, r.K) for r in measured] == [
        ("prefill_gemm", 3, 128, 256),
        ("decode_linear", 2, 128, 256),
    ]
    captured = capsys.readouterr()
    assert captured.out == table.render(measured) + "\n"
    assert "roof: reads 3.0 TB/s, FP8 products 1500.0 TFLOPS" in captured.err
    assert "[2/2] decode_linear M=2 N=128 K=256" in captured.err
    assert "3.00 TB/s, 1500 TFLOPS" in picture.read_text()


def test_moe(asked: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "results.jsonl", tmp_path / "results.svg"
    arguments = ["--only", "tp8_uniform", "--tokens", "16", "48", "--out", str(out)]
    assert main(["bench", "moe", *arguments, "--plot", str(picture)]) == 0
    assert asked == [(reference, ["tp8_uniform"], False, [16, 48])]
    measured = records.read(out)
    assert [(r.bench, r.M, r.N, r.K) for r in measured] == [
        ("moe_layer", tokens, None, 256) for tokens in (1, 2, 5)
    ]
    variant = {"parallel": "TP2", "routing": "uniform", "experts": 4, "intermediate": 128}
    assert {**variant, "topk": 2, "scale": "ue8m0"} == measured[0].variant
    captured = capsys.readouterr()
    assert captured.out == table.render(measured) + "\n"
    assert "roof: reads 3.0 TB/s" in captured.err
    assert "[3/3] moe_layer M=5 K=256 TP2 uniform experts=4 intermediate=128 topk=2 ue8m0" in (
        captured.err
    )
    text = picture.read_text()  # over M, beside the roof
    assert "moe_layer, K=256, TP2 uniform experts=4" in text and ">roof<" in text
    assert "lower is better" in text
    assert main(["bench", "show", str(out)]) == 0
    assert capsys.readouterr().out == captured.out
    assert main(["bench", "plot", str(out), str(tmp_path / "again.svg")]) == 0


def test_only_takes_the_names_of_layers(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bench", "moe", "--only", "tp2_uniform"])
    assert "'tp1_uniform', 'tp1_skewed', 'tp1_single'" in capsys.readouterr().err


def test_nothing_is_written_unasked(asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "quant"]) == 0
    assert asked == [(reference, [], False)]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "results.txt"], "ends in .svg, .png, .pdf"),
        (["--out", "missing/results.jsonl"], "No such file or directory"),
    ],
)
def test_unwritable_files_are_refused_before_measuring(
    asked: list, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "quant", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and "[1/2]" not in error


def test_no_backend(asked: list, capsys: pytest.CaptureFixture[str], monkeypatch):
    def choose(op, device):
        raise RuntimeError("no ue8m0 backend for device 'cuda' (UE8M0_BACKEND=auto): portable: ...")

    monkeypatch.setattr(dispatch, "choose", choose)
    assert main(["bench", "quant"]) == 1
    assert capsys.readouterr().err.startswith("vllm-ue8m0 bench: no ue8m0 backend for device")
