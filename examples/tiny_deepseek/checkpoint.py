"""The model's config, tokenizer and checkpoint files, as DeepSeek-V3.1 lays them out.

`*.weight` e4m3 with `*.weight_scale_inv` float32 (powers of two) per 128x128 block; one entry per
expert; the MTP layer is `model.layers.<num_hidden_layers>`. Unlike DeepSeek's files the MTP layer
carries no copies of embed_tokens and shared_head.head: vLLM shares the main model's with it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_ue8m0.codec import convert_scale_from_ue8m0
from vllm_ue8m0.reference import weight_dequant, weight_quant

from .model import QuantLinear, TinyDeepseek

BOS, EOS = 256, 257  # token ids 0..255 are the bytes

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "kv_lora_rank": 512,  # with qk_rope_head_dim 64 the only sizes that vLLM's MLA kernels take
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    # Factor 1 is plain RoPE. vLLM 0.32 rotates DeepSeek's q and k rightly on the CPU only in its
    # YaRN class, the one V3.1 uses: the plain one's kernel there takes [T, heads * D], not 3-D.
    "rope_scaling": {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 258,
}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def encode(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself if printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def tokenizer_json() -> dict:
    special = {"<bos>": BOS, "<eos>": EOS}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    bos, a, b = (
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, a],
            "pair": [bos, a, b],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {char: i for i, char in enumerate(byte_alphabet())} | special,
            "merges": [],
        },
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
    "chat_template": CHAT_TEMPLATE,
}


def export(model: TinyDeepseek, folder: str | Path, quantize: bool = True) -> int:
    """Write a checkpoint folder; returns its size in bytes.

    quantize=False rounds the weights that the model holds to bf16 instead: the trained float32
    ones, or those of a loaded fixture, whose e4m3 * 2^k values bf16 holds exactly.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    quantized = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu().to(torch.float32)
        for key, part in _split_experts(name, value):
            if name in quantized and quantize:
                codes, sf = weight_quant(part, ue8m0=True)
                tensors[key] = codes
                tensors[f"{key}_scale_inv"] = convert_scale_from_ue8m0(sf)
            elif name.endswith("e_score_correction_bias"):
                tensors[key] = part.contiguous()
            else:
                tensors[key] = part.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | ({"quantization_config": QUANTIZATION} if quantize else {})
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    for file, content, indent in (
        ("config.json", config, 1),
        ("generation_config.json", generation, None),
        ("tokenizer.json", tokenizer_json(), None),
        ("tokenizer_config.json", TOKENIZER_CONFIG, 1),
    ):
        text = json.dumps(content, indent=indent, ensure_ascii=False)
        (folder / file).write_text(text + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """A checkpoint's tensors as float32, dequantized, under the names of TinyDeepseek's state."""
    stored = load_file(Path(folder) / "model.safetensors")
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if f"{name}_scale_inv" in stored:
            value = weight_dequant(value, stored[f"{name}_scale_inv"], out_dtype=torch.float32)
        value = value.to(torch.float32)
        if ".experts." in name:
            prefix, rest = name.split(".experts.")
            index, rest = rest.split(".", 1)
            experts[f"{prefix}.experts.{rest}"][int(index)] = value
        else:
            state[name] = value
    for name, parts in experts.items():
        state[name] = torch.stack([parts[i] for i in range(len(parts))])
    return state


def _split_experts(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if ".experts." not in name:
        return [(name, value)]
    return [(name.replace(".experts.", f".experts.{i}."), v) for i, v in enumerate(value)]
