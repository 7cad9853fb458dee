"""Converted checkpoints served beside what they were made of."""

import shutil

import pytest
import torch
from harness import FIXTURES, kl
from safetensors.torch import load_file, save_file
from tiny_deepseek.checkpoint import encode

from vllm_ue8m0.checkpoint.convert import convert

MODEL = FIXTURES / "tiny_deepseek"
C = 1.3228756189346313  # the factor of the o_proj scales of DeepSeek-V3.1
pytestmark = pytest.mark.vllm


def test_factored_checkpoint_before_and_after(served, tmp_path):
    """Scales c * 2^k as in DeepSeek-V3.1: identical logits, and no flag needed any more."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(MODEL, before)
    weights = load_file(before / "model.safetensors")
    changed = [name for name in weights if name.endswith("o_proj.weight_scale_inv")]
    for name in changed:
        weights[name] *= C
    assert changed
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    convert(before, after, quant_method="ue8m0", max_shard_bytes=1_000_000)
    assert len(list(after.glob("*.safetensors"))) > 1

    ids = encode((FIXTURES / "heldout.txt").read_bytes()).tolist()
    prompts = [ids[:512], ids[512:700]]
    expected = served(before, prompts, generate=16)
    found = served(after, prompts, generate=16, quantization=None)
    assert all(map(torch.equal, expected["logits"], found["logits"]))
    assert expected["greedy"] == found["greedy"]
    plain = served(MODEL, prompts, generate=16)
    assert not torch.equal(plain["logits"][0], expected["logits"][0])  # the factor is in use


@pytest.mark.parametrize("to", ["fp32-scales", "bf16"])
def test_every_output_is_served(served, tmp_path, to):
    """Without scale_fmt, or without scales: close logits; UE8M0 bytes: test_deepseek.py."""
    convert(MODEL, tmp_path / "a", to)
    ids = encode((FIXTURES / "heldout.txt").read_bytes()).tolist()
    prompts = [ids[:512], ids[512:700]]
    expected = served(MODEL, prompts, generate=16)
    options = {"quantization": None} if to == "bf16" else {}
    found = served(tmp_path / "a", prompts, generate=16, **options)
    assert 0 < kl(expected["logits"], found["logits"]) < 0.05
