"""MLA's rotary embedding, in place."""

import torch


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    latent: torch.Tensor | None = None,
    cache: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Rotate the last R columns of every head of q [M, H, D], and k [M, R], in place.

    positions [M] integers, rows of cos_sin [P, R]: R / 2 cosines, then as many sines. Columns 2 i
    and 2 i + 1 are a pair. All of one dtype, in which each product and each sum is rounded: vLLM's
    DeepseekScalingRotaryEmbedding outside of a compiled graph (`rotate_gptj`).

    cache [B, S, L + R]: latent [M, L] and the rotated k become rows of it, row m at slots[m]
    (block slots[m] // S); not where that is negative, nor past the end of slots. This is what
    vLLM's `concat_and_cache_mla` does with 16-bit caches.
    """
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    R = cos_sin.shape[1]
    for x, c, s in ((q[..., q.shape[-1] - R :], cos[:, None], sin[:, None]), (k, cos, sin)):
        even, odd = x[..., ::2].clone(), x[..., 1::2].clone()
        x[..., ::2] = even * c - odd * s
        x[..., 1::2] = odd * c + even * s
    if latent is not None and cache is not None and slots is not None:
        used = slots >= 0
        rows = torch.cat((latent, k), dim=1)[: len(slots)][used]
        cache[slots[used] // cache.shape[1], slots[used] % cache.shape[1]] = rows
