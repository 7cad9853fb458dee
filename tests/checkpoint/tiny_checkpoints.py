"""Small checkpoints for tests: written by the safetensors library, or byte by byte where wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
SHAPES = ((576, 576), (192, 576), (300, 70), (1, 1), (128, 128), (129, 257))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header (JSON value, or bytes as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_headers_only(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
    """A valid file of (dtype, shape, bytes) whose data is a hole: no disk space, no time."""
    header, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += size
    write_raw(path, header)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + position)


def write_checkpoint(
    directory: Path,
    *shards: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint directory; several shards get an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 576}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (directory / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(dict(shards[0]), directory / "model.safetensors")
        return directory
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def linears() -> dict[str, torch.Tensor]:
    """Linear weights of odd shapes and every float dtype, with a wide range of magnitudes."""
    tensors = {}
    for i, shape in enumerate(SHAPES):
        w = torch.randn(shape) * torch.logspace(-4, 0, shape[1])
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = w.to(DTYPES[i % 3])
    return tensors


def fp8_model(scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """One FP8 weight [300, 257] with power-of-two scales [3, 3] and a bf16 linear beside it."""
    codes = torch.randint(0, 127, (300, 257), dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7
    scale = 2.0 ** torch.randint(-120, 100, (3, 3)) if scale is None else scale
    return {
        "a.weight": codes.view(E4M3),
        "a.weight_scale_inv": scale,
        "b.weight": torch.randn(128, 128).bfloat16(),
    }
