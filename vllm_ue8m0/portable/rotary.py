"""MLA's rotary embedding on GPUs."""

import torch

from ..kernels import rotary


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> None:
    """Rotate the last columns of every head of q, and k; see reference.rotary_embedding."""
    assert q.stride(2) == k.stride(1) == cos_sin.stride(1) == positions.stride(0) == 1
    if q.numel():
        rotary.launch(q, k, positions, cos_sin)
