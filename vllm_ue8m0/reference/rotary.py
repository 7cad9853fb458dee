"""MLA's rotary embedding, in place."""

import torch


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> None:
    """Rotate the last R columns of every head of q [M, H, D], and k [M, R], in place.

    positions [M] integers, rows of cos_sin [P, R]: R / 2 cosines, then as many sines. Columns 2 i
    and 2 i + 1 are a pair. All of one dtype, in which each product and each sum is rounded: vLLM's
    DeepseekScalingRotaryEmbedding outside of a compiled graph (`rotate_gptj`).
    """
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    R = cos_sin.shape[1]
    for x, c, s in ((q[..., q.shape[-1] - R :], cos[:, None], sin[:, None]), (k, cos, sin)):
        even, odd = x[..., ::2].clone(), x[..., 1::2].clone()
        x[..., ::2] = even * c - odd * s
        x[..., 1::2] = odd * c + even * s
