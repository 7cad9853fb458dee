"""A checkpoint of DeepSeek-V3.1's shape, sparse: real headers and scales, holes for weights.

python tests/checkpoint/synthetic_v31.py DIR    61 layers and MTP, 256 experts: 689 GB apparent,
                                                91,991 tensors, 358 MB on disk

A weight's scale lies right behind it, so that reading scales means reading everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[1] / "fixtures/configs/deepseek-v3.1.json"
C = 1.3228756189346313
SHARD_BYTES = 4_300_000_000
HIDDEN, VOCAB, DENSE_LAYERS = 7168, 129280, 3

Entry = tuple[str, str, tuple[int, ...]]


def tensors(layers: int, experts: int) -> Iterator[Entry]:
    """Name, dtype and shape of every tensor but the scales; the last layer is the MTP layer."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    for i in range(layers + 1):
        layer = f"model.layers.{i}"
        if i == layers:
            yield f"{layer}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{norm}.weight", "BF16", (HIDDEN,)
            for name in ("embed_tokens", "shared_head.head"):
                yield f"{layer}.{name}.weight", "BF16", (VOCAB, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", "BF16", (HIDDEN,)
        attention = f"{layer}.self_attn"
        yield f"{attention}.q_a_layernorm.weight", "BF16", (1536,)
        yield f"{attention}.kv_a_layernorm.weight", "BF16", (512,)
        yield f"{attention}.q_a_proj.weight", "F8_E4M3", (1536, HIDDEN)
        yield f"{attention}.q_b_proj.weight", "F8_E4M3", (24576, 1536)
        yield f"{attention}.kv_a_proj_with_mqa.weight", "F8_E4M3", (576, HIDDEN)
        yield f"{attention}.kv_b_proj.weight", "F8_E4M3", (32768, 512)
        yield f"{attention}.o_proj.weight", "F8_E4M3", (HIDDEN, 16384)
        if i < min(DENSE_LAYERS, layers):
            yield from _mlp(f"{layer}.mlp", 18432)
            continue
        yield f"{layer}.mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from _mlp(f"{layer}.mlp.shared_experts", 2048)
        for expert in range(experts):
            yield from _mlp(f"{layer}.mlp.experts.{expert}", 2048)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)


def _mlp(prefix: str, intermediate: int) -> Iterator[Entry]:
    yield f"{prefix}.gate_proj.weight", "F8_E4M3", (intermediate, HIDDEN)
    yield f"{prefix}.up_proj.weight", "F8_E4M3", (intermediate, HIDDEN)
    yield f"{prefix}.down_proj.weight", "F8_E4M3", (HIDDEN, intermediate)


class _Shard:
    """One file being planned: header entries, and where which scales go."""

    def __init__(self) -> None:
        self.header: dict[str, dict[str, object]] = {}
        self.size = 0
        self.scales: list[tuple[int, int, bool]] = []

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape)) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        offsets = [self.size, self.size + size]
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.size += size

    def add_scale(self, weight: str, shape: tuple[int, ...]) -> None:
        grid = tuple(-(-size // 128) for size in shape)
        self.scales.append((self.size, grid[0] * grid[1], ".o_proj." in weight))
        self.add(f"{weight}_scale_inv", "F32", grid)

    def write(self, path: Path, random: np.random.Generator) -> None:
        text = json.dumps(self.header, separators=(",", ":")).encode()
        start = 8 + len(text)
        with open(path, "wb") as file:
            file.truncate(start + self.size)
            file.write(len(text).to_bytes(8, "little") + text)
            for offset, count, factored in self.scales:
                exponents = random.integers(127 - 16, 127 - 8, count, dtype=np.uint32)
                scale = (exponents << 23).view(np.float32)
                file.seek(start + offset)
                file.write((scale * np.float32(C if factored else 1.0)).tobytes())


def write(directory: Path, layers: int = 61, experts: int = 256, seed: int = 0) -> int:
    """Write the checkpoint; returns its number of tensors, scales included."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shards = [_Shard()]
    for name, dtype, shape in tensors(layers, experts):
        if shards[-1].size > SHARD_BYTES:
            shards.append(_Shard())
        shards[-1].add(name, dtype, shape)
        if dtype == "F8_E4M3":
            shards[-1].add_scale(name, shape)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.write(directory / file, random)
        weight_map |= dict.fromkeys(shard.header, file)
    config = json.loads(CONFIG.read_text()) | {
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(weight_map)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} tensors")
