"""The command line: exit codes, one-line errors, and no heavy import before a verb runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_ue8m0
from vllm_ue8m0.bench import GEMM_BENCHES, QUANT_OPS
from vllm_ue8m0.checkpoint.convert import QUANT_METHODS, TARGETS
from vllm_ue8m0.checkpoint.steps import SCALE_DTYPES
from vllm_ue8m0.cli import main
from vllm_ue8m0.reference import weight_quant

FIXTURE = Path(__file__).parent / "fixtures/tiny_deepseek"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    tensors = {"a.weight": torch.randn(200, 150), "b.o_proj.weight": torch.randn(8, 8)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def test_convert(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "target")
    options = ["--scale-dtype", "uint8", "--quant-method", "ue8m0", "--ignore", "*.o_proj", "x"]
    assert main(["convert", str(source), target, *options]) == 0
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    assert tensors["a.weight_scale_inv"].dtype == torch.uint8
    assert tensors["b.o_proj.weight"].dtype == torch.float32
    captured = capsys.readouterr()
    assert captured.out == f"{target}: 1 tensors converted, 1 copied, 0.00 GB -> 0.00 GB\n"
    assert "100%" in captured.err
    assert main(["convert", target, str(tmp_path / "back"), "--to", "bf16"]) == 0
    assert load_file(tmp_path / "back" / "model.safetensors")["a.weight"].dtype == torch.bfloat16


def test_convert_requantizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", str(tmp_path / "target")
    source.mkdir()
    codes, scale = weight_quant(torch.randn(300, 200), ue8m0=False)
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert main(["convert", str(source), target]) == 1
    assert "--requantize" in capsys.readouterr().err
    arguments = ["convert", str(source), target, "--requantize", "--workers", "3"]
    assert main([*arguments, "--max-memory", "20MB"]) == 1
    assert "--max-memory is 19 MiB; this checkpoint needs at least" in capsys.readouterr().err

    def interrupt(self: object, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vllm_ue8m0.checkpoint.writer.Progress.__call__", interrupt)
        assert main(arguments) == 130
    assert "The same command continues" in capsys.readouterr().err
    assert main([*arguments, "--max-memory", "200MB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    pattern = r"1 of them requantized, relative error at most [12]\.\d\d% \(a\.weight\)"
    assert re.fullmatch(pattern, lines[1])


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text(
        '{"bench": "act_quant", "M": 1, "N": null, "K": 7168, "ours_us": 2.0, "limit_us": 1.0, '
        '"peers_us": {"vllm": 4.0}, "context_us": {}, "num_bytes": 21560, "ours": "portable", '
        '"gpu": "Test GPU", "versions": {}, "date": "2026-11-22", "scale": "ue8m0"}\n'
    )
    return path


def break_config(source: Path) -> None:
    text = '{"quantization_config": {"quant_method": "gptq"}}'
    (source / "config.json").write_text(text)


def break_shard(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def break_access(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(break_config, "gptq"), (break_shard, "truncated"), (break_access, "Is a directory")],
)
def test_errors_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, words: str
) -> None:
    damage(source)
    assert main(["convert", str(source), str(tmp_path / "target")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vllm-ue8m0 convert: ") and words in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["convert"],
        ["convert", "a", "b", "--to", "int8"],
        ["convert", "a", "b", "--max-memory", "lots"],
        ["convert", "a", "b", "--workers", "0"],
        ["inspect"],
        ["inspect", "a", "--json", "--all"],
        ["verify", "a"],
        ["verify", "a", "b", "--tolerance", "-1"],
        ["verify", "a", "b", "--tolerance", "nan"],
        ["doctor", "a", "b"],
        ["eval"],
        ["eval", "--text", "a.txt"],
        ["eval", "a", "--top-k", "0"],
        ["eval", "a", "--context", "1"],
        ["eval", "a", "--quantization", "ue8m0"],
        ["bench"],
        ["bench", "quant", "--only", "gemm"],
        ["bench", "gemm", "--only", "act_quant"],
        ["bench", "gemm", "--shape", "7168"],
        ["bench", "gemm", "--shape", "7168,0"],
        ["bench", "gemm", "--shape", "7168,2048,1"],
        ["bench", "plot", "results.jsonl"],
        ["tune", "7168,2048"],
        ["tune", "--shape", "7168"],
        ["tune", "--rounds", "0"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: vllm-ue8m0" in capsys.readouterr().err


def test_bench_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results.jsonl"
    assert main(["bench", "quant", "--only", "act_quant", "weight_quant", "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vllm-ue8m0 bench: no CUDA device (torch ")
    assert "`vllm-ue8m0 bench show FILE.jsonl`" in lines[0]
    assert not any(tmp_path.iterdir())


def test_bench_shows_and_plots_what_was_recorded(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "show", str(recorded)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("act_quant\n") and "vllm 2.00 over 1" in text
    pytest.importorskip("matplotlib")
    assert main(["bench", "plot", str(recorded), str(tmp_path / "results.png")]) == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bench_errors_are_one_line(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.jsonl"
    with recorded.open("a") as file:
        file.write("not json\n")
    for arguments, words in (
        (["show", str(missing)], f"No such file or directory: '{missing}'"),
        (["show", str(recorded)], f"{recorded}:2: not a benchmark record: Expecting value"),
        (["plot", str(recorded), "results.svg"], f"{recorded}:2: "),
    ):
        assert main(["bench", *arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("vllm-ue8m0 bench: ") and words in lines[0]


def test_bench_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "quant", "--help"])
    text = capsys.readouterr().out
    assert all(op in text for op in QUANT_OPS)
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "gemm", "--help"])
    text = capsys.readouterr().out
    assert all(bench in text for bench in GEMM_BENCHES)


def test_choices_are_those_of_convert(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for choices in (TARGETS, SCALE_DTYPES, QUANT_METHODS):
        assert "{" + ",".join(choices) + "}" in text


@pytest.mark.parametrize("arguments", [["--version"], ["bench", "show", "RECORDED"]])
def test_verbs_that_need_no_torch_load_none(arguments: list[str], recorded: Path) -> None:
    arguments = [str(recorded) if a == "RECORDED" else a for a in arguments]
    code = f"import sys; from vllm_ue8m0.cli import main\ntry: main({arguments})\n"
    code += "finally: print({'torch', 'triton', 'vllm', 'matplotlib'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    expected = f"vllm-ue8m0 {vllm_ue8m0.__version__}\n" if "--version" in arguments else "act_q"
    assert result.stdout.startswith(expected)
    assert result.stdout.splitlines()[-1] == "set()"


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-m", "vllm_ue8m0.cli", "inspect", str(FIXTURE)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b""
    run.stderr.close()
    assert run.wait() == 1
