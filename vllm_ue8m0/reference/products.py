"""Products: the float32 product of the dequantized operands, times c, plus bias, rounded once.

For power-of-two scales each dequantized operand is exact, so nothing but the order of the float32
sum is left open.
"""

from __future__ import annotations

import torch

from ..layouts import ceil_div, local_experts
from .quant import add_rms_norm, dequantize, dequantize_activations, fake_quant, silu_mul

# Rows of a weight dequantized at a time: bounds the float32 copy to 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def matmul(
    a: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    gran: tuple[int, int],
    c: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """a [M, K] float32 @ dequantized w [N, K]^T -> [M, N] float32, a few weight rows at a time."""
    N, K = w.shape
    rows = max(_CHUNK_ELEMENTS // max(K, 1) // gran[0], 1) * gran[0]
    out = torch.empty(a.shape[0], N, dtype=torch.float32, device=a.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        scales = sf[start // gran[0] : ceil_div(stop, gran[0])]
        torch.mm(a, dequantize(w[start:stop], scales, gran).t(), out=out[:, start:stop])
    if c is not None:
        out *= c.repeat_interleave(gran[0])[:N]
    if bias is not None:
        out += bias.to(torch.float32)
    return out


def gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Quantized a [M, K] with 1 x gk scales, times w [N, K]^T -> [M, N] out_dtype."""
    return matmul(dequantize_activations(a, a_s, gran[1]), w, sf, gran, c, bias).to(out_dtype)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    activation_scale: str,
) -> torch.Tensor:
    """Quantize x [M, K] as activation_scale says, times w^T -> [M, N] in x's dtype."""
    a = fake_quant(x, gran[1], activation_scale)
    return matmul(a, w, sf, gran, c, bias).to(x.dtype)


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    normed: bool,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    activation_scale: str,
    shared: torch.Tensor | None = None,
    factor: float = 1.0,
) -> list[torch.Tensor]:
    """linear of add_rms_norm of x [M, K], or of x * factor + shared -> [[M, N], ...].

    The sum with the residual is the next result, if there is a residual; the norm's result is the
    last one if `normed`. As rms_norm_quant. With `shared`, x is routed experts' result, and both
    steps are rounded to its dtype.
    """
    if shared is not None:
        x = x * factor + shared
    result, *total = add_rms_norm(x, norm_weight, eps, residual)
    out = linear(result, w, sf, c, bias, gran, activation_scale)
    return [out, *total, *([result] if normed else [])]


def latent_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    side_weight: torch.Tensor,
    side_eps: float,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    activation_scale: str,
) -> list[torch.Tensor]:
    """norm_linear of the first columns of x, beside a norm of the next -> [[M, N], [M, L], [M, R]].

    MLA's compressed queries, keys and values and the keys' rotary part: x [M, K + L + R] with
    norm_weight [K] and side_weight [L]; the last R columns are copied.
    """
    K = len(norm_weight)
    latent, rest = x[:, K:].split([len(side_weight), x.shape[1] - K - len(side_weight)], 1)
    out = norm_linear(
        x[:, :K], norm_weight, eps, None, False, w, sf, c, bias, gran, activation_scale
    )
    return [*out, *add_rms_norm(latent, side_weight, side_eps), rest.clone()]


def silu_mul_linear(
    gate_up: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: tuple[int, int],
    activation_scale: str,
) -> torch.Tensor:
    """linear of silu_mul of gate_up [M, 2 K]."""
    return linear(silu_mul(gate_up), w, sf, c, bias, gran, activation_scale)


def experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gran13: tuple[int, int],
    gran2: tuple[int, int],
    activation_scale: str,
    weight_on_input: bool,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Routed experts: x [M, H], w13 [E, 2I, H] (gate rows first), w2 [E, H, I] -> [M, H].

    topk_ids [M, topk] are local expert ids, -1 = skip (padding, or an expert of another rank), or
    global ones with expert_map [experts of all ranks], which has the local ids, -1 for none.
    The result is written to out, if that is given.
    Every (token, slot) product is weighted in float32 and rounded to x's dtype; the slots of a
    token are summed in float32 in slot order and rounded once.
    """
    topk_ids = local_experts(topk_ids, expert_map)
    M, topk = topk_ids.shape
    slots = torch.zeros(M, topk, x.shape[1], dtype=x.dtype, device=x.device)
    source = x * topk_weights.to(x.dtype) if weight_on_input else x
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        product = _expert(
            expert, source[token], w13, sf13, c13, w2, sf2, c2, gran13, gran2, activation_scale
        )
        if not weight_on_input:
            product *= topk_weights[token, slot, None].to(torch.float32)
        slots[token, slot] = product.to(x.dtype)
    total = slots.to(torch.float32).sum(1).to(x.dtype)
    return total if out is None else out.copy_(total)


def batched_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    counts: torch.Tensor,
    gran13: tuple[int, int],
    gran2: tuple[int, int],
    activation_scale: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert of its own rows: x [E, T, H], weights as in `experts` -> [E, T, H].

    Of x[e] the first counts[e] rows are used, counts [E] int; the others may hold anything, and
    the result has no defined value there. It is neither weighted nor summed: a row is what
    `experts` makes of it before its weight, rounded once to x's dtype. The result is written to
    out, if that is given, which must not overlap x.
    """
    if out is None:
        out = torch.empty_like(x)
    for expert, rows in enumerate(counts.tolist()):
        out[expert, :rows] = _expert(
            expert, x[expert, :rows], w13, sf13, c13, w2, sf2, c2, gran13, gran2, activation_scale
        ).to(x.dtype)
    return out


def _expert(
    expert: int, x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, c13: torch.Tensor | None,
    w2: torch.Tensor, sf2: torch.Tensor, c2: torch.Tensor | None, gran13: tuple[int, int],
    gran2: tuple[int, int], activation_scale: str,
) -> torch.Tensor:  # fmt: skip
    """One expert of x [M, H] -> float32 [M, H]."""
    c13, c2 = (None if c is None else c[expert] for c in (c13, c2))
    gate_up = linear(x, w13[expert], sf13[expert], c13, None, gran13, activation_scale)
    hidden = fake_quant(silu_mul(gate_up), gran2[1], activation_scale)
    return matmul(hidden, w2[expert], sf2[expert], gran2, c2)
