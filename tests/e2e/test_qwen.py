"""Llama-like block FP8 checkpoints with float32 scales, and vLLM's features on a dense model."""

import json
import shutil

import pytest
import tiny_qwen
import torch
from harness import GPU, check_alone_and_together, kl
from safetensors.torch import load_file, save_file

from vllm_ue8m0 import inspect

pytestmark = pytest.mark.vllm
RANK, ALPHA = 8, 24
# In float32 and without rounded activations only the order of sums differs from transformers'.
UNROUNDED = {"additional_config": {"ue8m0": {"activation_scale": "none"}}}
EXACT = {"dtype": "float32", **UNROUNDED}
SAME = 1e-4 if GPU else 1e-9  # nats a token; GPUs multiply float32 as TF32
# vLLM's LoRA kernels for GPUs take no float32.
DENSE, DENSE_SAME = (UNROUNDED, 2e-3) if GPU else (EXACT, SAME)
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (300, 150, 41, 7)]  # fmt: skip
LORA = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_qwen.make(tmp_path_factory.mktemp("qwen") / "dense")


@pytest.fixture(scope="module")
def truth(dense):
    return tiny_qwen.logits(dense[1], PROMPTS)


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    """A random LoRA adapter of every linear layer, as PEFT writes it, and the merged logits."""
    folder, merged = tmp_path_factory.mktemp("lora"), tmp_path_factory.mktemp("merged") / "merged"
    torch.manual_seed(1)
    shutil.copytree(dense[1], merged)
    weights, tensors = load_file(merged / "model.safetensors"), {}
    for layer in range(tiny_qwen.LAYERS):
        for name, N, K in tiny_qwen.linears(moe=False):
            module = f"model.layers.{layer}.{name}"
            a, b = torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) * 0.1
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            weights[f"{module}.weight"] += ALPHA / RANK * b @ a
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[-1] for name, _, _ in tiny_qwen.linears(moe=False)})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "bias": "none", "target_modules": targets, "base_model_name_or_path": str(dense[0]),
    }))  # fmt: skip
    return str(folder), tiny_qwen.logits(merged, PROMPTS)


@pytest.fixture
def plain(dense, adapter, served):
    """One engine: without an adapter, with it, and without again."""
    steps = [("lora", adapter[0]), ("logits", None), ("lora", None), ("logits", None)]
    return served(dense[0], PROMPTS, generate=16, steps=steps, **DENSE, **LORA)


def test_float32_scales_are_served_exactly(dense, truth, plain):
    """The logits are those of transformers with the dequantized weights."""
    report = inspect(dense[0])
    assert report.servable
    assert {t.kind for t in report.tensors if t.info.dtype == "F8_E4M3"} == {"arbitrary"}
    found = kl(truth, plain["logits"])
    print(found)
    assert found < DENSE_SAME
    assert "float32 kept" in plain["log"]


def test_lora_on_linear_layers(truth, adapter, plain):
    """The adapter's logits are those of the merged weights, and they go when it goes."""
    _, with_adapter, _, without = plain["steps"]
    found, effect = kl(adapter[1], with_adapter), kl(truth, with_adapter)
    print(found, effect)
    assert found < DENSE_SAME
    assert effect > 0.01
    assert all(map(torch.equal, plain["logits"], without))


def test_chunked_prefill_and_prefix_cache(dense, truth, plain, served):
    """Chunks of 64 tokens, and prompts from the cache: what whole prompts give.

    Attention may sum in another order then; the linear layers' rows do not depend on their batch.
    (vLLM 0.32's CPU attention does not: the same bits, 2026-11-23.)
    """
    small = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_prefix_caching": True}
    run = served(dense[0], PROMPTS, generate=16, steps=[("next", None)], **small, **DENSE)
    assert "Chunked prefill is enabled with max_num_batched_tokens=64" in run["log"]
    (after,) = run["steps"]
    found, hits = kl(truth, run["logits"]), [count for _, count in after]
    cached = [last[-1:].log_softmax(-1) for last in truth], [row[None] for row, _ in after]
    print(found, kl(*cached), hits)
    assert found < DENSE_SAME
    assert run["greedy"] == plain["greedy"]
    assert hits[0] >= 256 and hits[1] >= 128  # whole blocks of the longer two
    assert kl(*cached) < DENSE_SAME


@pytest.fixture
def rounded(dense, served):
    """As such checkpoints are served: bfloat16, activations with float32 scales."""
    if not GPU:
        return served(dense[0], PROMPTS)
    steps = [("scores", False), ("scores", True)]
    return served(dense[0], PROMPTS, steps=steps, env={"VLLM_BATCH_INVARIANT": "1"})


def test_rounded_activations(truth, rounded):
    found = kl(truth, rounded["logits"])
    print(found)
    assert 1e-4 < found < 0.05
    assert "activation scales fp32" in rounded["log"]


@pytest.mark.skipif(not GPU, reason="VLLM_BATCH_INVARIANT=1 is Triton kernels of vLLM's own")
def test_batch_invariant(rounded):
    """A prompt's log-probabilities and those of its continuation: alone and in a batch, bitwise."""
    check_alone_and_together(rounded["steps"])


def test_experts_with_scales_in_bfloat16(served, tmp_path):
    folder, plain = tiny_qwen.make(tmp_path / "moe", moe=True, scale_dtype=torch.bfloat16)
    assert inspect(folder).servable
    truth = tiny_qwen.logits(plain, PROMPTS)
    run = served(folder, PROMPTS, steps=[("reload", None), ("logits", None)], **EXACT)
    found = kl(truth, run["logits"])
    print(found)
    assert found < SAME
    error, reloaded = run["steps"]
    assert error is None
    assert all(map(torch.equal, run["logits"], reloaded))
    assert "experts layers" in run["log"] and "float32 kept" in run["log"]
