"""Shared experts' activation in the linear layer behind it, where they are no part of vLLM's graph.

There, as in 0.26 on GPUs, vLLM compiles the activation alone, which takes 140 us of the host for
each layer of a step that is no CUDA graph (H200, 2026-11-30), and its result is quantized by
another kernel. In a graph it is plugin/fusion.py that joins them.
"""

from __future__ import annotations

from typing import Any

import torch

from . import compat
from .linear import Ue8m0LinearMethod


class _Left(torch.nn.Module):
    """In place of an activation: the layer behind it is given gate and up, and activates them.

    A graph that was compiled before still gives that layer the activation's result.
    """

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


def take_activation(shared_experts: Any) -> None:
    """Of what vLLM runs beside a layer of routed experts, if it is DeepSeek's MLP; once is enough.

    Not under LoRA, whose layers add to the product of what they are given themselves.
    """
    mlp = compat.shared_mlp(shared_experts)
    if type(mlp).__name__ != "DeepseekV2MLP" or type(mlp.act_fn) is not compat.SiluAndMul:
        return
    down = mlp.down_proj
    if isinstance(down, compat.LinearBase) and isinstance(down.quant_method, Ue8m0LinearMethod):
        down.quant_method.activates = True
        mlp.act_fn = _Left()
