"""MLA's cache rows, written where their keys are rotated.

vLLM writes them with a kernel of its own between the rotation and the attention, beside which
nothing runs: 2.3 us of each layer of a decode step of one token (a trace, H200, 2026-11-30). Here
the rotation does it. Its operator is told the layer by q_b_proj's weight, since a name would make
every layer's graph another one to torch.compile, and asks vLLM for the layer's cache and slots. The
layer's `do_kv_cache_update`, which vLLM calls next, then finds a note that these rows are there.
Without one, as outside of a graph or where compat.py knows of a difference, vLLM writes.
"""

from __future__ import annotations

from typing import Any

import torch

from ..library import OPS
from . import compat

_LIBRARY = torch.library.Library("vllm_ue8m0", "FRAGMENT")
_LIBRARY.define(
    "rotary_and_cache(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin, Tensor latent,"
    " Tensor w) -> ()"
)
_attentions: dict[int, str] = {}  # by the address of q_b_proj's weight
_written: dict[str, tuple[int, ...]] = {}  # addresses by layer, from the rotation to the update


class _Update:
    """The layer `name`'s `do_kv_cache_update`, but for rows that are written."""

    def __init__(self, name: str, original: Any) -> None:
        self.name, self.original = name, original

    def __call__(
        self, latent: torch.Tensor, key: Any, cache: torch.Tensor, slots: torch.Tensor,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if _written.pop(self.name, None) != _addresses(latent, cache, slots):
            self.original(latent, key, cache, slots, *args, **kwargs)


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def register(w: torch.Tensor, prefix: str) -> None:
    """The weight of the layer `prefix`: of MLA's q_b_proj, others do not matter."""
    _attentions[w.data_ptr()] = prefix.rpartition(".")[0] + ".attn"


def _rotary_and_cache(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
    latent: torch.Tensor, w: torch.Tensor,
) -> None:  # fmt: skip
    name = _attentions.get(w.data_ptr(), "")
    _written.pop(name, None)  # a step that ended between the two
    found = compat.mla_cache(name)
    if found is None or not _fits(k, latent, found[1], found[2]):
        OPS.rotary_embedding(q, k, positions, cos_sin)
        return
    attention, cache, slots = found
    OPS.rotary_embedding(q, k, positions, cos_sin, latent, cache, slots)
    if "do_kv_cache_update" not in vars(attention):
        attention.do_kv_cache_update = _Update(name, attention.do_kv_cache_update)
    _written[name] = _addresses(latent, cache, slots)


def _fits(k: torch.Tensor, latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> bool:
    return (
        cache.dtype == latent.dtype == k.dtype
        and cache.dim() == 3 and cache.shape[2] == latent.shape[1] + k.shape[1]
        and cache.numel() > 0 and cache.stride(2) == 1
        and slots.dim() == 1 and slots.stride(0) == 1 and len(slots) <= len(k)
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("rotary_and_cache", _rotary_and_cache, _device)
torch.library.register_fake("vllm_ue8m0::rotary_and_cache", lambda *arguments: None, lib=_LIBRARY)
ROTARY: Any = torch.ops.vllm_ue8m0.rotary_and_cache.default
