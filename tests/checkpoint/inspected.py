"""Small checkpoints to inspect, and what their reports say."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_checkpoints import BLOCK_FP8, E4M3, write_checkpoint

from vllm_ue8m0.checkpoint.report import Report, Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "tiny_deepseek"
UE8M0 = {**BLOCK_FP8, "scale_fmt": "ue8m0"}
C = 1.3228756189346313
Tensors = dict[str, torch.Tensor]


def write(directory: Path, *shards: Tensors, config: object = None, **quantization: object) -> Path:
    write_checkpoint(directory, *shards, quantization={**UE8M0, **quantization})
    if config is not None:
        text = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(text))
    return directory


def one(report: Report, name: str = "a.weight") -> Tensor:
    return next(tensor for tensor in report.tensors if tensor.name == name)


def problems(report: Report) -> list[str]:
    assert report.servable == (not report.problems)
    return [f"{problem.tensor} {problem.problem}" for problem in report.problems]


def linear(rows: int = 128, columns: int = 128, scale: float = 1.0, noise: bool = False) -> Tensors:
    grid = (-(-rows // 128), -(-columns // 128))
    s = torch.full(grid, scale) * (1 + noise * torch.rand(grid))
    return {"weight": torch.ones(rows, columns).to(E4M3), "weight_scale_inv": s}


def model(**layers: Tensors) -> Tensors:
    """In the keyword, __ stands for a dot."""
    return {
        f"{module.replace('__', '.')}.{name}": tensor
        for module, tensors in layers.items()
        for name, tensor in tensors.items()
    }
