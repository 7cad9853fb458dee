"""`inspect`: what serving makes of layers, the table, the command line, a checkpoint of 689 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_v31
import torch
from inspected import MODEL, C, linear, model, one, write
from tiny_checkpoints import fp8_model

from vllm_ue8m0 import inspect
from vllm_ue8m0.checkpoint import show
from vllm_ue8m0.cli import main


def test_one_arbitrary_shard_keeps_the_fused_layer(tmp_path: Path) -> None:
    layers = {
        "mlp__gate_proj": linear(),
        "mlp__up_proj": linear(256, 300, noise=True),
        "mlp__down_proj": linear(scale=C),
        "mlp__experts__0__gate_proj": linear(),
        "mlp__experts__1__up_proj": linear(256, 300, noise=True),
        "mlp__experts__0__down_proj": linear(),
    }
    report = inspect(write(tmp_path, model(**layers)))
    served = {tensor.name.removesuffix("_proj.weight"): tensor.served for tensor in report.tensors}
    assert served == {
        "mlp.gate": "float32 kept",
        "mlp.up": "float32 kept",
        "mlp.down": "bytes and c",
        "mlp.experts.0.gate": "float32 kept",
        "mlp.experts.1.up": "float32 kept",
        "mlp.experts.0.down": "bytes",
    }
    # What the others are by themselves does not change.
    assert one(report, "mlp.gate_proj.weight").kind == "pow2"


def test_tensor_parallel_sizes_that_cut_blocks(tmp_path: Path) -> None:
    layer = "model__layers__0__"
    layers = {
        f"{layer}mlp__gate_proj": linear(1536),
        f"{layer}mlp__up_proj": linear(1536),
        f"{layer}mlp__down_proj": linear(128, 1536),
        f"{layer}mlp__experts__0__gate_proj": linear(192),
        f"{layer}mlp__experts__0__down_proj": linear(128, 192),
        f"{layer}self_attn__q_proj": linear(1024),
        f"{layer}self_attn__k_proj": linear(256),
        f"{layer}self_attn__v_proj": linear(256),
        f"{layer}self_attn__q_a_proj": linear(192),
        "other": linear(192),
    }
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    report = inspect(write(tmp_path, model(**layers), config=config))
    assert report.servable
    found = {tensor.name.split(".", 3)[-1]: tensor.cuts for tensor in report.tensors}
    # 1536 / 8 = 192 = 1.5 blocks, and so on down
    rows = {8: (64, 128), 16: (32, 128), 32: (16, 128)}
    assert found["mlp.gate_proj.weight"] == found["mlp.up_proj.weight"] == rows
    too_fine = "refused: groups of 16 columns, at least 32 are needed"
    assert found["mlp.down_proj.weight"] == {8: (128, 64), 16: (128, 32), 32: too_fine}
    # The boundary between gate and up cuts a block without any parallelism.
    w13, w2 = (found[f"mlp.experts.0.{name}_proj.weight"] for name in ("gate", "down"))
    assert w13[1] == (64, 128) and 1 not in w2
    assert w13[2] == (32, 128) and w2[2] == (128, 32)
    assert w13[4] == w2[4] == too_fine
    # Two key-value heads of 128 rows are repeated from four ranks on; eight heads end at eight.
    k = found["self_attn.k_proj.weight"]
    assert set(k) == {16, 32} and k[16] == "refused: 8 attention heads do not divide by 16"
    assert found["self_attn.q_a_proj.weight"] == {}
    assert one(report, "other.weight").cuts == {}
    row = next(line.split() for line in show.text(report).splitlines() if "128x32" in line)
    assert row == ["model.layers.*.mlp.down_proj.weight", *"---", "128x64", "128x32", "refused"]


def test_table_folds_and_shows_what_is_odd(tmp_path: Path) -> None:
    layers = {f"model__layers__{i}__self_attn__o_proj": linear() for i in range(12)}
    layers["model__layers__5__self_attn__o_proj"] = linear(scale=C)
    report = inspect(write(tmp_path, model(**layers)))
    lines = show.text(report).splitlines()
    rows = [line.split() for line in lines[: lines.index("", 2)] if "o_proj" in line]
    assert [row[:2] for row in rows] == [
        ["model.layers.*.self_attn.o_proj.weight", "11"],
        ["model.layers.5.self_attn.o_proj.weight", "1"],
    ]
    assert "c = 1.32287562" in lines[4]
    everything = show.text(report, everything=True)
    assert all(f"model.layers.{i}.self_attn.o_proj.weight" in everything for i in range(12))


def test_names_that_no_terminal_prints(tmp_path: Path) -> None:
    raw = {"\ud800.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(raw).encode()
    data = len(text).to_bytes(8, "little") + text + b"\0"
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "\\ud800.weight" in show.text(inspect(tmp_path))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODEL)]) == 0
    out = capsys.readouterr().out
    assert "--quantization ue8m0 serves this checkpoint: 72 bytes, 23 unquantized" in out
    assert len(out.splitlines()) < 80
    assert main(["inspect", str(MODEL), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["servable"] is True
    bad = write(tmp_path / "bad", fp8_model(torch.full((3, 3), torch.nan)))
    assert main(["inspect", str(bad), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["servable"] is False and data["problems"][0]["tensor"] == "a.weight_scale_inv"
    assert main(["inspect", str(bad)]) == 1
    assert "does not serve this checkpoint" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("vllm-ue8m0 inspect: ")


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        file = tmp_path / f"p{suffix}"
        assert main(["inspect", str(MODEL), "--plot", str(file)]) == 0
        assert file.read_bytes().startswith(start)
    assert "2^k (288)" in (tmp_path / "p.svg").read_text()
    capsys.readouterr()
    for name, words in (("p.gif", "ends in .svg, .png, .pdf"), ("no/p.svg", "no directory")):
        assert main(["inspect", str(MODEL), "--plot", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(MODEL), "--plot", "p.svg"]) == 1
    assert 'pip install "vllm_ue8m0[bench]"' in capsys.readouterr().err


PEAK = r"""
import json, re, sys, time
start = time.monotonic()
from vllm_ue8m0 import inspect
report = inspect(sys.argv[1])
# Not getrusage: its ru_maxrss begins with the size of the parent process.
peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
found = {"seconds": time.monotonic() - start, "peak": peak, "servable": report.servable}
print(json.dumps({**found, **report.total()["served"]}))
"""


def measure(directory: Path) -> dict[str, float]:
    command = [sys.executable, "-c", PEAK, str(directory)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.no_cover
def test_the_whole_of_v31(tmp_path: Path) -> None:
    assert synthetic_v31.write(tmp_path) == 91_991
    found = measure(tmp_path)
    print(f"{found['seconds']:.1f} s, {found['peak'] / 2**20:.0f} MiB")
    assert found["servable"] and found["bytes"] == 45_746 and found["bytes and c"] == 62
    assert found["peak"] < 2**30 and found["seconds"] < 60
