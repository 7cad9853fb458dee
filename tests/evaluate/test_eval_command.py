"""`vllm-ue8m0 eval`, with a vLLM that is made up or not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recordings import made_up, recording

from vllm_ue8m0.cli import main
from vllm_ue8m0.evaluate import TOP_K, command
from vllm_ue8m0.evaluate.recording import read, write


@pytest.fixture
def files(tmp_path):
    """a.npz and b.npz, of two models on the same tokens."""
    windows, p, q = made_up(1)
    write(tmp_path / "a.npz", recording(p, windows, 50, model="original"))
    arguments = ["--quantization", "ue8m0"]
    quantized = recording(
        q, windows, 50, model="quantized", arguments=arguments, quantization="ue8m0"
    )
    write(tmp_path / "b.npz", quantized)
    return tmp_path


@pytest.fixture
def jobs(monkeypatch, files):
    """The jobs that were given to a recorder; it copies b.npz, and vLLM aborts when it ends."""
    found = []

    def run(command, stdout, check):
        assert stdout == 2 and command[:3] == [
            sys.executable, "-m", "vllm_ue8m0.evaluate.recorder",
        ]  # fmt: skip
        found.append(json.loads(Path(command[3]).read_text()))
        write(Path(found[-1]["out"]), read(files / "b.npz"))
        return subprocess.CompletedProcess(command, -6)

    monkeypatch.setattr(command.subprocess, "run", run)
    return found


def test_two_recordings(files, capsys):
    arguments = ["eval", str(files / "b.npz"), "--reference", str(files / "a.npz")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[2:])) <= 100
    assert lines[0] == "reference  original (bfloat16; vllm 0.32.0, CPU, 2026-11-23)"
    assert lines[1].startswith("candidate  quantized --quantization ue8m0 (ue8m0, bfloat16; ")
    heading = "text tokens perplexity reference's KL >= +- 99 % max top-1"
    assert lines[3].split() == heading.split() and lines[4].startswith("0.txt      77")
    assert "the reference's 50 likeliest" in "\n".join(lines)
    assert main([*arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["total"]["kl"] > 0 and found["texts"][0]["text"] == "0.txt"
    assert found["kl"].startswith("KL(reference || candidate)")
    assert found["candidate"]["versions"] and found["reference"]["date"] == "2026-11-23"
    assert lines[4].split()[4] == f"{found['total']['kl']:.3g}"


def test_recordings_need_neither_torch_nor_vllm(files):
    arguments = ["eval", str(files / "b.npz"), "--reference", str(files / "a.npz")]
    code = f"import sys; from vllm_ue8m0.cli import main; main({arguments})\n"
    code += "print({'torch', 'triton', 'vllm'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_perplexity_alone(files, capsys):
    assert main(["eval", str(files / "a.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("candidate") and lines[2].split() == ["text", "tokens", "perplexity"]
    assert main(["eval", str(files / "a.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] is None and found["total"]["kl"] is None


def test_what_is_infinite_is_null(files, capsys):
    made = read(files / "a.npz")
    made.actual[3] = -float("inf")
    write(files / "c.npz", made)
    assert main(["eval", str(files / "c.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["perplexity"] is None


def test_a_text_is_recorded(files, jobs, monkeypatch, capsys):
    monkeypatch.chdir(files)
    (files / "t.txt").write_text("Wörter", encoding="utf-8")
    (files / "new.npz").write_text("what an earlier run left")
    command_line = ["eval", "DIR", "--text", "t.txt", "--out", "new.npz", "--context", "64"]
    engine = ["--quantization", "ue8m0", "--enforce-eager"]
    assert main([*command_line, "--", *engine]) == 0
    (job,) = jobs
    assert (job["model"], job["arguments"], job["texts"]) == ("DIR", engine, [["t.txt", "Wörter"]])
    assert (job["context"], job["top_k"]) == (64, TOP_K) and "reference" not in job
    assert read(files / "new.npz").meta["model"] == "quantized"
    assert not [file for file in files.iterdir() if file.name.startswith("new.npz.")]
    assert "perplexity" in capsys.readouterr().out


def test_the_references_text_is_recorded(files, jobs, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(["eval", "DIR", "--reference", "a.npz"]) == 0
    (job,) = jobs
    assert job["reference"] == str(files / "a.npz") and job["arguments"] == []
    assert "texts" not in job and "KL >=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DIR"], "nothing to predict"),
        (["DIR", "--reference", "a.npz", "--text", "t.txt"], "leave them out"),
        (["DIR", "--reference", "a.npz", "--top-k", "5"], "leave them out"),
        (["b.npz", "--out", "c.npz"], "b.npz is recorded"),
        (["b.npz", "--reference", "a.npz", "--", "--enforce-eager"], "b.npz is recorded"),
        (["DIR", "--reference", "missing.npz"], "No such file"),
        (["DIR", "--reference", "t.txt"], "t.txt: not a recording"),
        (["DIR", "--reference", "."], "a directory, not a recording"),
        (["DIR", "--text", "missing.txt"], "No such file"),
        (["DIR", "--text", "binary"], "not text in UTF-8"),
        (["DIR", "--text", "t.txt", "--out", "no/where.npz"], "there is no directory no"),
    ],
)
def test_errors_are_one_line(files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files)
    (files / "t.txt").write_text("text")
    (files / "binary").write_bytes(b"\xff\xfe")

    def run(*_, **__):
        raise AssertionError("vLLM was started")

    monkeypatch.setattr(command.subprocess, "run", run)
    assert main(["eval", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-ue8m0 eval: ") and words in line


@pytest.mark.parametrize(("error", "words"), [("a: 0 tokens", "a: 0 tokens"), (None, "status 7")])
def test_a_recorder_that_fails(files, monkeypatch, capsys, error, words):
    monkeypatch.chdir(files)

    def run(command, stdout, check):
        if error is not None:
            Path(json.loads(Path(command[3]).read_text())["error"]).write_text(error)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(command.subprocess, "run", run)
    before = (files / "b.npz").read_bytes()
    assert main(["eval", "DIR", "--reference", "a.npz", "--out", "b.npz"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (files / "b.npz").read_bytes() == before  # what was there is kept
