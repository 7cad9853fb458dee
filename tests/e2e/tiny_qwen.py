"""Random Qwen3 and Qwen3-MoE checkpoints in block FP8, and their dequantized logits.

As Qwen publishes them: quant_method fp8, 128x128 blocks, scales amax / 448, which are no powers of
two, and no scale_fmt. Sizes are no multiples of 128 where a model's need not be.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB, LAYERS, EXPERTS = 256, 4, 2, 64, 264, 2, 8
INNER = {False: 320, True: 192}  # by whether the model has experts


def linears(moe):
    """(name, N, K) of a layer's quantized weights."""
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"self_attn.{name}_proj", heads * HEAD, HIDDEN
    yield "self_attn.o_proj", HIDDEN, HEADS * HEAD
    for mlp in [f"mlp.experts.{i}" for i in range(EXPERTS)] if moe else ["mlp"]:
        yield f"{mlp}.gate_proj", INNER[moe], HIDDEN
        yield f"{mlp}.up_proj", INNER[moe], HIDDEN
        yield f"{mlp}.down_proj", HIDDEN, INNER[moe]


def quantized(w, scale_dtype):
    """float32 [N, K] -> codes, scales of 128x128 blocks in scale_dtype."""
    blocks = torch.nn.functional.pad(w, (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
    blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [n, 128, k, 128]
    scale = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = codes.flatten(2).flatten(0, 1)[: w.shape[0], : w.shape[1]].contiguous()
    return codes, scale


def config(moe):
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True,
               "moe_intermediate_size": INNER[True], "decoder_sparse_step": 1,
               "mlp_only_layers": []}  # fmt: skip
    return {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "attention_bias": False, "head_dim": HEAD, "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INNER[False], "max_position_embeddings": 1024,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": VOCAB,
        "bos_token_id": 256, "eos_token_id": 257, **(experts if moe else {}),
    }  # fmt: skip


def make(folder, moe=False, scale_dtype=torch.float32):
    """Write folder, and folder-plain with the same numbers in float32, unquantized."""
    folder, plain = Path(folder), Path(f"{folder}-plain")
    tensors, values = {}, {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, N, K in linears(moe):
            codes, scale = quantized(torch.randn(N, K) * 1.5 / K**0.5, scale_dtype)
            grid = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensors[f"{prefix}{name}.weight"] = codes
            tensors[f"{prefix}{name}.weight_scale_inv"] = scale
            values[f"{prefix}{name}.weight"] = codes.float() * grid[:N, :K]
    others = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
              "lm_head.weight": torch.randn(VOCAB, HIDDEN) * 3 / HIDDEN**0.5,
              "model.norm.weight": torch.rand(HIDDEN) + 0.5}  # fmt: skip
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN,
                 "self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}  # fmt: skip
        for name, size in norms.items():
            others[f"{prefix}{name}.weight"] = torch.rand(size) + 0.5
        if moe:
            others[f"{prefix}mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5
    others = {name: tensor.bfloat16() for name, tensor in others.items()}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128],
                    "modules_to_not_convert": [
                        "lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(LAYERS) if moe)
                    ]}  # fmt: skip
    for directory, weights, extra in (
        (folder, tensors | others, {"quantization_config": quantization}),
        (plain, values | {n: t.float() for n, t in others.items()}, {"torch_dtype": "float32"}),
    ):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({**config(moe), **extra}))
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return folder, plain


def logits(plain, prompts):
    """[T, V] float32 of each prompt, by transformers in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
