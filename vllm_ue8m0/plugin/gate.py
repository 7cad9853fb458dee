"""Routed experts' gate of few tokens on this project's kernels.

vLLM multiplies by it inside its op of a layer of experts, between the norm and what chooses and
sorts tokens, and nothing but shared experts runs beside that: docs/design.md has the figures. Where
vLLM has a kernel of its own for so few tokens as are left to it here, that is as fast, or was not
measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import warmup
from ..kernels import replay
from . import foreign


def take(prefix: str) -> warmup.Operator | None:
    """Of the layer of experts `prefix`, in the model that is being built; what there is to warm up
    for it, or None where its gate stays vLLM's."""
    layer, backend = foreign.layer_and_backend(prefix)
    gate: Any = getattr(layer, "gate", None)
    if type(gate).__name__ != "GateLinear" or not hasattr(backend, "gate"):
        return None
    w, original = gate.weight, gate.forward
    if (
        "forward" in vars(gate)
        or not foreign.on_gpu(w)
        or backend.gate_refusal(w[:1], w) is not None
    ):
        return None  # a reload, a weight that is elsewhere, no such kernel
    least = _least_rows(gate)

    def forward(x: torch.Tensor) -> Any:
        if torch.compiler.is_compiling() or len(x) < least or not foreign.on_gpu(gate.weight):
            return original(x)
        if backend.gate_refusal(x, gate.weight) is not None:
            return original(x)
        return replay.run(backend.gate, x, gate.weight, logits_dtype(gate, len(x))), None

    gate.forward = forward
    return warmup.gate(w.dtype, partial(logits_dtype, gate), *w.shape)


def _least_rows(gate: Any) -> int:
    if getattr(gate, "allow_ll_bf16_gemm", False):  # float32 logits of up to 16 tokens
        return 17
    return 2 if _own_rows(gate) else 1


def _own_rows(gate: Any) -> int:
    """Rows up to which vLLM has a kernel for DeepSeek-V3's gate: until 0.28."""
    has = getattr(gate, "allow_dsv3_router_gemm", False)
    return int(getattr(gate, "_dsv3_max_batch", 16)) if has else 0


def logits_dtype(gate: Any, rows: int) -> torch.dtype:
    """vLLM's, for so many rows: of a gate that is not told, that kernel's logits are float32."""
    own = torch.float32 if rows <= _own_rows(gate) else gate.weight.dtype
    dtype: torch.dtype = gate.out_dtype or own
    return dtype
