"""Loading in vLLM: what is damaged is refused with what to do, and memory stays bounded."""

import json
import shutil
import sys

import pytest
import torch
from harness import FIXTURES, HERE, run_vllm
from safetensors.torch import load_file, save_file

MODEL = FIXTURES / "tiny_deepseek"
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.mlp.experts.3.up_proj"
pytestmark = pytest.mark.vllm


def without(tensors, name):
    del tensors[name]


def edit(tensors, name, change):
    tensors[name] = change(tensors[name])


def rename(tensors, name, other):
    tensors[other] = tensors.pop(name)


def put(tensors, name, value):
    tensors[name].view(-1)[1] = value


def as_bytes(tensors, code):
    scale = tensors[f"{DOWN}.weight_scale_inv"]
    tensors[f"{DOWN}.weight_scale_inv"] = torch.full(scale.shape, code, dtype=torch.uint8)


# name -> (change of config.json's quantization_config, change of the tensors, expected error)
DAMAGED = {
    "no_config": (None, None, "vllm-ue8m0 convert"),
    "scale_fmt": ({"scale_fmt": "e5m3"}, None, "'scale_fmt'"),
    "static": ({"activation_scheme": "static"}, None, "Static activation scales"),
    "block": ({"weight_block_size": [64, 64]}, None, "[64, 64]"),
    "option": ({"activation_scale": "fp64"}, None, "activation_scale is 'fp64'"),
    "missing": ({}, lambda t: without(t, f"{DOWN}.weight_scale_inv"), f"{DOWN}.weight"),
    "shape": (
        {}, lambda t: edit(t, f"{DOWN}.weight_scale_inv", lambda s: torch.cat([s, s])), DOWN
    ),
    "bf16": ({}, lambda t: edit(t, f"{DOWN}.weight", lambda w: w.bfloat16()), DOWN),
    "nan": ({}, lambda t: put(t, f"{UP}.weight_scale_inv", torch.nan), "is NaN"),
    "inf": ({}, lambda t: put(t, f"{UP}.weight_scale_inv", torch.inf), "is infinite"),
    "negative": ({}, lambda t: put(t, f"{UP}.weight_scale_inv", -1.0), "is negative"),
    "zero": ({}, lambda t: put(t, f"{UP}.weight_scale_inv", 0.0), "is zero"),
    "byte255": ({}, lambda t: as_bytes(t, 255), "byte 255"),
    "byte0": ({}, lambda t: as_bytes(t, 0), "below 2^-126"),
    "name": ({}, lambda t: rename(t, f"{DOWN}.weight_scale_inv", f"{DOWN}.scale"), "KeyError"),
    "truncated": ({}, None, "model.safetensors"),
}  # fmt: skip


def damage(folder, quantization, tensors):
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    if quantization is None:
        del config["quantization_config"]
    else:
        config["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        weights = load_file(folder / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name, (quantization, tensors, _) in DAMAGED.items():
        damage(folder / name, quantization, tensors)
    whole = (folder / "truncated/model.safetensors").read_bytes()
    (folder / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    out = run_vllm(HERE / "load_model.py", *(folder / name for name in DAMAGED), stdout_only=True)
    return dict(zip(DAMAGED, map(json.loads, out.splitlines()), strict=True))


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint_is_refused(outcomes, name):
    assert outcomes[name]["error"] is not None, "served as if nothing were wrong"
    assert DAMAGED[name][2] in outcomes[name]["error"]


@pytest.mark.parametrize("name", DAMAGED)
def test_inspect_says_so_beforehand(tmp_path, name):
    from vllm_ue8m0 import inspect

    damage(tmp_path / name, *DAMAGED[name][:2])
    if name == "truncated":
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(ValueError, match="is truncated"):
            inspect(tmp_path / name)
    else:
        assert not inspect(tmp_path / name).servable


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_host_memory(tmp_path):
    """Below 1.3 x (the largest shard + the model's bytes), above what was there before."""
    from test_smollm2 import smollm2_bf16

    from vllm_ue8m0 import convert

    convert(smollm2_bf16(tmp_path / "bf16"), tmp_path / "ue8m0")
    shard = (tmp_path / "ue8m0/model.safetensors").stat().st_size
    out = run_vllm(HERE / "load_model.py", tmp_path / "ue8m0", stdout_only=True)
    found = json.loads(out)
    used = found["peak"] - found["before"]
    print(f"{used / 2**20:.0f} MiB above the start; shard {shard}, model {found['model']}")
    assert found["error"] is None
    assert found["model"] > 0.9 * shard
    assert used < 1.3 * (shard + found["model"])
