"""Weights reloaded into a served model, as reinforcement learning does between its steps."""

import shutil

import pytest
import torch
from harness import FIXTURES, GPU
from safetensors.torch import load_file, save_file
from tiny_deepseek.checkpoint import encode

MODEL = FIXTURES / "tiny_deepseek"
C = 1.3228756189346313  # the factor of the o_proj scales of DeepSeek-V3.1
pytestmark = pytest.mark.vllm
SCALE = ".weight_scale_inv"


def ids():
    return encode((FIXTURES / "heldout.txt").read_bytes()).tolist()


PROMPTS = [ids()[:256], ids()[256:400]]


def variant(folder, change):
    """The fixture with change(name, tensor) for each of its tensors."""
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor) for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def not_pow2(name):
    """Which of `started`'s scales are no powers of two: a linear layer's and experts'."""
    return name.endswith(SCALE) and ("layers.0.mlp.down" in name or "layers.1.mlp.experts" in name)


def factored(name):
    return name.endswith(f"o_proj{SCALE}")


def started(name, tensor):
    """All kinds of scales in one model: bytes, bytes and c, float32."""
    if factored(name):
        return tensor * C
    return tensor * (1 + 0.1 * torch.rand_like(tensor)) if not_pow2(name) else tensor


def other(name, tensor):
    """Other values everywhere, in scales that the tensors of `started` can hold."""
    if name.endswith(SCALE):
        return tensor * (1.5 if factored(name) and "layers.0" in name else 1)
    if name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).roll(1, 0).view(tensor.dtype)
    return tensor * 1.25 if "norm" in name else tensor


def unfit(name, tensor):
    """A layer whose scales were powers of two, with others."""
    return tensor * (1 + torch.rand_like(tensor)) if name.endswith(f"kv_b_proj{SCALE}") else tensor


on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA graphs, no sleep mode without a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, or patience")
layouts = pytest.mark.parametrize("layout", [
    {"enforce_eager": True},
    pytest.param({"enforce_eager": False}, marks=on_gpu),
    pytest.param({"tensor_parallel_size": 2, "enable_expert_parallel": True}, marks=two_gpus),
], ids=["eager", "graphs", "tp2-ep"])  # fmt: skip


@layouts
def test_reload_in_place(served, tmp_path, layout):
    """The logits and the text of a reloaded model are those of one that started with the weights.

    Bit for bit, for the same weights and for others.
    """
    first, second = variant(tmp_path / "first", started), variant(tmp_path / "second", other)
    bad = variant(tmp_path / "bad", unfit)
    ask = [("logits", None), ("greedy", 16)]
    steps = [
        ("reload", None), *ask, ("reload", second), *ask, ("load", first), *ask,
        ("reload", first), *ask, ("reload", bad), ("fails", "logits"),
    ]  # fmt: skip
    run = served(first, PROMPTS, generate=16, steps=steps, **layout)
    fresh = served(second, PROMPTS, generate=16, **layout)
    assert "2 bytes and c" in run["log"] and "float32 kept" in run["log"]
    answers = iter(run["steps"])

    def check(expected):
        assert all(map(torch.equal, next(answers), expected["logits"]))
        assert next(answers) == expected["greedy"]

    assert next(answers) is None
    check(run)
    assert next(answers) is None
    check(fresh)
    assert not torch.equal(run["logits"][0], fresh["logits"][0])
    assert "reload_weights" in next(answers)  # model.load_weights: refused, and nothing happened
    check(fresh)
    assert next(answers) is None
    check(run)
    assert "kv_b_proj: the weight scales to reload are neither" in next(answers)
    assert next(answers) is not None  # what is incomplete is not served


@on_gpu
@layouts
def test_sleep(served, tmp_path, layout):
    """Level 1, and level 2 with a reload: what was served before, bit for bit."""
    first = variant(tmp_path / "first", started)
    ask = [("logits", None), ("greedy", 16)]
    steps = [("nap", 1), *ask, ("nap", 2), *ask, ("nap", 2), *ask]
    run = served(first, PROMPTS, generate=16, steps=steps, enable_sleep_mode=True, **layout)
    answers = iter(run["steps"])
    for _ in range(3):
        next(answers)
        assert all(map(torch.equal, next(answers), run["logits"]))
        assert next(answers) == run["greedy"]
