"""`bench quant` and `bench gemm` from the command line to their files; the clock needs no GPU."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import dispatch, reference
from vllm_ue8m0.bench import gemm, machine, quant, records, roof, run, table, timing
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
