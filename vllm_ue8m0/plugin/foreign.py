"""Layers of vLLM's own whose products of few tokens this project's kernels can take.

Not in batch-invariant runs, where more rows would be another kernel's.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..kernels.config import batch_invariant
from . import compat


def layer_and_backend(name: str) -> tuple[Any, Any]:
    """Layer `name` (None if there is none) of the model that is being built, and the kernels.

    (None, None) where all stays vLLM's: outside of vLLM, in batch-invariant runs, without a GPU.
    """
    config = compat.current_config()
    if config is None or batch_invariant() or not torch.cuda.is_available():
        return None, None
    return config.compilation_config.static_forward_context.get(name), backend()


def on_gpu(w: torch.Tensor) -> bool:
    return w.is_cuda


def backend() -> Any:
    return dispatch.choose("linear", "cuda").load()
