"""The report of this machine and of others, as text and JSON, with and without what it needs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from installations import CPU, HOPPER, HOPPER_VLLM
from safetensors.torch import save_file

from vllm_ue8m0 import dispatch
from vllm_ue8m0.cli import main
from vllm_ue8m0.doctor import model, report
from vllm_ue8m0.doctor.ask_vllm import stock_fp8
from vllm_ue8m0.doctor.problems import find
from vllm_ue8m0.reference import weight_quant

FIXTURE = Path(__file__).parents[1] / "fixtures/tiny_deepseek"


def made(facts, vllm, about=None):
    capability = facts.gpus[0].capability if facts.gpus else None
    problems = find(facts, vllm, about)
    return report.Report(facts, vllm, stock_fp8(vllm, capability), about, problems)


def test_text():
    lines = report.text(made(HOPPER, HOPPER_VLLM)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("versions      python 3.12.3, torch 2.14.0, triton 3.9.0, vllm 0.33")
    text = "\n".join(lines)
    assert "2 x NVIDIA H100 80GB HBM3, sm_90, 132 SMs, 79 GiB, 227 KiB shared memory" in text
    assert (
        "kernels       act_quant: portable (Triton kernels for sm_90); not reference: slow" in text
    )
    assert "linear: sm90 (Gluon kernels for sm_90); not reference: slow" in text
    assert "UE8M0 activation scales: in part" in text
    assert lines[-1] == "nothing is broken: --quantization ue8m0 should work here"


def test_text_of_what_is_broken():
    broken = replace(HOPPER, compiler=False, environment={"UE8M0_BACKEND": "reference"})
    found = made(broken, None)
    assert not found.works
    lines = report.text(found).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("BROKEN", "note"))] == [
        "BROKEN", "note", "BROKEN",
    ]  # fmt: skip
    assert lines[-1] == "2 broken" and any(line.strip().startswith("-> ") for line in lines)


def test_json():
    found = json.loads(json.dumps(made(CPU, None).to_json()))
    assert found["works"] is False and found["vllm"] is None and found["model"] is None
    assert found["problems"][0]["do"] == 'pip install "vllm_ue8m0[cpu]"'
    assert found["stock_fp8"]["answer"] == "unknown" and found["gpus"] == []
    assert {"operator", "backend", "status", "reason"} == {*found["kernels"][0]}


@pytest.fixture
def without_vllm(monkeypatch):
    """As where vLLM is not installed, and with an entry point whatever this package is run from."""
    monkeypatch.setattr("vllm_ue8m0.doctor.ask_vllm.find_spec", lambda name: None)
    monkeypatch.setattr(report, "find", lambda facts, *rest: find(
        replace(facts, entry_point=True), *rest
    ))  # fmt: skip


def test_command(without_vllm, capsys):
    assert main(["doctor", "--json", "--no-self-test", str(FIXTURE)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False
    assert found["model"]["served"]["bytes"] == 72 and found["model"]["problems"] == []
    assert main(["doctor", "--no-self-test", str(FIXTURE.parent)]) == 1
    assert "vLLM is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [["triton", "vllm"], ["torch", "triton", "vllm"]])
def test_what_is_missing_is_said(missing):
    """In a process of its own, where these cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "from vllm_ue8m0.cli import main; sys.exit(main(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    found = json.loads(done.stdout)
    assert any("vLLM is not installed" in p["found"] for p in found["problems"])
    if "torch" in missing:
        assert found["device"] is None and "torch" in found["torch_error"]
    else:
        rows = [k for k in found["kernels"] if k["operator"] == "linear"]
        assert ("portable", "triton is not installed") in [
            (k["backend"], k["reason"]) for k in rows
        ]


def test_model_not_a_directory():
    found = model.look_at("deepseek-ai/DeepSeek-V3.1", "cpu")
    assert "is not a directory" in found.problems[0]


def test_model_refused(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    found = model.look_at(str(tmp_path), "cpu")
    assert "vllm-ue8m0 convert" in found.problems[0] and found.linears == {}
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert "model.safetensors" in model.look_at(str(tmp_path), "cpu").problems[0]


def write_model(directory, shapes, **quantization):
    """A checkpoint of random weights, layer name -> [N, K]."""
    tensors = {}
    for name, (N, K) in shapes.items():
        q, s = weight_quant(torch.randn(N, K))
        prefix = f"model.layers.{name}"
        tensors |= {f"{prefix}.weight": q, f"{prefix}.weight_scale_inv": s}
    save_file(tensors, directory / "model.safetensors")
    quantization = {"quant_method": "ue8m0", **quantization}
    config = {"dtype": "bfloat16", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))


def experts(layer, H, I, count=3):  # noqa: E741
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        f"{layer}.mlp.experts.{e}.{name}": shape
        for e in range(count)
        for name, shape in shapes.items()
    }


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("UE8M0_BACKEND", raising=False)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


ODD = "rows of w do not start at multiples of 16 bytes"


def test_model_on_hopper(tmp_path, hopper):
    """The backend's own refusals are asked of every linear weight and of every layer's experts."""
    write_model(
        tmp_path,
        {
            "0.self_attn.o_proj": (128, 256),
            "0.mlp.down_proj": (128, 200),
            **experts(1, 400, 256),
            **experts(2, 400, 128),
            **experts(3, 256, 192),
            **experts(4, 200, 128),
        },
    )
    found = model.look_at(str(tmp_path), "cuda")
    assert found.problems == [] and found.dtype == "bfloat16"
    assert found.linears == {"sm90": 1, "portable": 1} and found.refused == {ODD: 1}
    assert found.experts == {"sm90": 2, "portable": 2}
    assert found.experts_refused == {
        "w13: scale blocks of 64x128, not 128x128": 1,
        "w13 is not contiguous with rows at multiples of 16 bytes": 1,
    }
    text = report.text(made(HOPPER, HOPPER_VLLM, found))
    assert "linear weights of one rank: 1 on portable, 1 on sm90" in text
    assert f"not for 1: {ODD}" in text
    assert "layers of experts of one rank: 2 on sm90, 2 on portable" in text


def test_activations_decide_too(tmp_path, hopper):
    """Kernels for quantized activations multiply none that are not."""
    write_model(
        tmp_path,
        {"0.self_attn.o_proj": (128, 256), **experts(1, 256, 128)},
        activation_scale="none",
    )
    found = model.look_at(str(tmp_path), "cuda")
    reason = {"activations are not quantized": 1}
    assert found.linears == found.experts == {"portable": 1}
    assert found.refused == found.experts_refused == reason
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["activation_scale"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    found = model.look_at(str(tmp_path), "cuda")
    assert found.linears == {"sm90": 1} and found.experts_refused == {"activations are float32": 1}


def test_block_scaling_needs_bytes(tmp_path, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    layers = {"0.self_attn.o_proj": (128, 256), **experts(1, 256, 128)}
    write_model(tmp_path, layers)
    found = model.look_at(str(tmp_path), "cuda")
    assert found.linears == found.experts == {"sm100": 1}
    write_model(tmp_path, layers, activation_scale="fp32")
    found = model.look_at(str(tmp_path), "cuda")
    assert found.linears == found.experts == {"portable": 1}
    assert found.refused == found.experts_refused == {"activation scales are fp32, not bytes": 1}
