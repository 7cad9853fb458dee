"""MLA's absorbed products on this project's kernel, where a step has few tokens.

vLLM multiplies queries by W_UK, and what attention gives by W_UV, with torch.bmm inside its
attention op, between kernels that are this project's. cuBLAS's kernel neither starts before the
kernel in front of it has ended nor has its weights on their way by then. vLLM takes both weights
from kv_b_proj after it is loaded. Here they are laid out for the kernel then, and are a class of
parameter that torch.bmm asks first; everything else finds a parameter.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import warmup
from ..kernels import replay
from . import foreign

NAMES = ("W_UK_T", "W_UV")  # [H, P, L] and [H, L, V]


class AbsorbedWeight(torch.nn.Parameter):
    """w [H, K, N], a view of contiguous [H, N, K]."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.bmm and len(args) == 2 and kwargs.keys() == {"out"}:
                x, w = args
                replay.run(foreign.backend().bmm, x, w.as_subclass(torch.Tensor), kwargs["out"])
                return kwargs["out"]
            return func(*args, **kwargs)


def take(prefix: str, dtype: torch.dtype) -> warmup.Operator | None:
    """Of the MLA layer whose kv_b_proj `prefix` is being loaded, in the model that is being built;
    what there is to warm up for it, or None."""
    attention, backend = foreign.layer_and_backend(prefix.rpartition(".")[0] + ".attn")
    if not hasattr(attention, "kv_lora_rank") or not hasattr(backend, "bmm"):
        return None  # VLLM_MLA_DISABLE=1: attention of keys and values as others'
    if "process_weights_after_loading" in vars(attention):
        return None  # a reload
    H, L = attention.num_heads, attention.kv_lora_rank
    P, R, V = (getattr(attention, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))
    if not (backend.bmm_shape_fits(L, P) and backend.bmm_shape_fits(V, L)):
        return None
    original, laid_out = attention.process_weights_after_loading, dict[str, torch.Tensor]()

    def process_weights_after_loading(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for name in NAMES:
            _lay_out(attention, name, laid_out)

    attention.process_weights_after_loading = process_weights_after_loading
    return warmup.absorbed(dtype, H, P, R, L, V)


def _lay_out(attention: Any, name: str, laid_out: dict[str, torch.Tensor]) -> None:
    """In the same memory after every load: CUDA graphs hold its address."""
    given = getattr(attention, name, None)
    if not isinstance(given, torch.Tensor) or not foreign.on_gpu(given):
        return
    rows = given.detach().as_subclass(torch.Tensor).transpose(1, 2)
    if name not in laid_out:
        laid_out[name] = rows.contiguous()
    kept = laid_out[name]
    if kept.data_ptr() != rows.data_ptr():
        kept.copy_(rows)
    setattr(attention, name, AbsorbedWeight(kept.transpose(1, 2), requires_grad=False))
