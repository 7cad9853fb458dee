"""MLA's rotary embedding on GPUs."""

import torch

from ..kernels import rotary


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    latent: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Rotate the last columns of every head of q, and k; see reference.rotary_embedding."""
    assert q.stride(2) == k.stride(1) == cos_sin.stride(1) == positions.stride(0) == 1
    if latent is not None and cache is not None and slots is not None:
        assert latent.stride(1) == cache.stride(2) == slots.stride(0) == 1
        assert latent.dtype == cache.dtype == k.dtype
    if q.numel():
        rotary.launch(q, k, positions, cos_sin, latent, cache, slots)
