"""Products on sm_100: portable's, block-scaled where `refusal` has no reason against it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from .. import portable

BYTES = (torch.uint8, torch.float8_e8m0fnu)
INSTRUCTION_K = 32  # codes of a row that share a scale in the tensor cores


def gemm(
    a: torch.Tensor,
    a_s: torch.Tensor | None,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """a [M, K] times w [N, K]^T; see reference.gemm."""
    activation_scale = "none" if a_s is None else "ue8m0" if a_s.dtype in BYTES else "fp32"
    scaled = refusal(a, w, sf, gran, activation_scale) is None
    return portable.gemm(a, a_s, w, sf, c, bias, gran, out_dtype, block_scaled=scaled)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
) -> torch.Tensor:
    """Quantize x [M, K] as activation_scale says, times w^T -> [M, N] in x's dtype."""
    scaled = refusal(x, w, sf, gran, activation_scale) is None
    return portable.linear(x, w, sf, c, bias, gran, activation_scale, block_scaled=scaled)


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
    gran: Sequence[int],
    activation_scale: str,
    shared: torch.Tensor | None = None,
    factor: float = 1.0,
) -> list[torch.Tensor]:
    """linear of a norm; see reference.norm_linear."""
    scaled = refusal(x, w, sf, gran, activation_scale) is None
    return portable.norm_linear(
        x, norm_weight, eps, residual, normed, w, sf, c, bias, gran, activation_scale, shared,
        factor, block_scaled=scaled,
    )  # fmt: skip


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
    gran: Sequence[int],
    activation_scale: str,
) -> list[torch.Tensor]:
    """linear of a norm beside another; see reference.latent_linear."""
    scaled = refusal(x, w, sf, gran, activation_scale) is None
    return portable.latent_linear(
        x, norm_weight, eps, side_weight, side_eps, w, sf, c, bias, gran, activation_scale,
        block_scaled=scaled,
    )  # fmt: skip


def silu_mul_linear(
    gate_up: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
) -> torch.Tensor:
    """linear of silu_mul, which quantizes; see reference.silu_mul_linear."""
    scaled = refusal(gate_up, w, sf, gran, activation_scale) is None
    return portable.silu_mul_linear(
        gate_up, w, sf, c, bias, gran, activation_scale, block_scaled=scaled
    )


def linear_plan(
    x: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, gran: Sequence[int], activation_scale: str
) -> Callable[[int], Hashable]:
    """What `linear` launches, by the number of rows: equal plans are equal kernels (warmup.py)."""
    scaled = refusal(x, w, sf, gran, activation_scale) is None
    return portable.linear_plan(x, w, sf, gran, activation_scale, block_scaled=scaled)


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
    gran13: Sequence[int],
    gran2: Sequence[int],
    activation_scale: str,
    weight_on_input: bool,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Routed experts; see reference.experts. Ids outside [0, E) are skipped."""
    scaled = experts_refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is None
    return portable.experts(
        x, w13, sf13, c13, w2, sf2, c2, topk_weights, topk_ids, gran13, gran2, activation_scale,
        weight_on_input, expert_map, out, block_scaled=scaled,
    )  # fmt: skip


def batched_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    sf13: torch.Tensor,
    c13: torch.Tensor | None,
    w2: torch.Tensor,
    sf2: torch.Tensor,
    c2: torch.Tensor | None,
    counts: torch.Tensor,
    gran13: Sequence[int],
    gran2: Sequence[int],
    activation_scale: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert of its own rows; see reference.batched_experts. out is contiguous."""
    scaled = experts_refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is None
    return portable.batched_experts(
        x, w13, sf13, c13, w2, sf2, c2, counts, gran13, gran2, activation_scale, out,
        block_scaled=scaled,
    )  # fmt: skip


def experts_plan(
    x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, w2: torch.Tensor, sf2: torch.Tensor,
    gran13: Sequence[int], gran2: Sequence[int], activation_scale: str, topk: int, num_global: int,
) -> Callable[[int], Hashable]:  # fmt: skip
    """What `experts` launches, by the number of tokens."""
    scaled = experts_refusal(x, w13, sf13, w2, sf2, gran13, gran2, activation_scale) is None
    return portable.experts_plan(
        x, w13, sf13, w2, sf2, gran13, gran2, activation_scale, topk, num_global,
        block_scaled=scaled,
    )  # fmt: skip


def refusal(
    a: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, gran: Sequence[int],
    activation_scale: str = "ue8m0",
) -> str | None:  # fmt: skip
    """Why the tensor cores do not scale these, or None; a: activations or their codes."""
    if activation_scale == "none":
        return "activations are not quantized"
    if activation_scale != "ue8m0":
        return f"activation scales are {activation_scale}, not bytes"
    if sf.dtype not in BYTES:
        return f"scales of w are {sf.dtype}, not bytes"
    if gran[1] % INSTRUCTION_K:
        return f"scale groups of {gran[1]} along K, no multiple of {INSTRUCTION_K}"
    return None


def experts_refusal(
    x: torch.Tensor, w13: torch.Tensor, sf13: torch.Tensor, w2: torch.Tensor, sf2: torch.Tensor,
    gran13: Sequence[int], gran2: Sequence[int], activation_scale: str,
) -> str | None:  # fmt: skip
    """Why the tensor cores do not scale these experts' products, or None."""
    return refusal(x, w13, sf13, gran13, activation_scale) or refusal(
        x, w2, sf2, gran2, activation_scale
    )


def describe(op: str, M: int, N: int, K: int) -> str:
    """How the product of [M, K] and [N, K] is launched, in "gemm" or "linear", for people."""
    text = portable.describe(op, M, N, K, block_scaled=True)
    return text.replace("portable", "sm100", 1) + ", block-scaled"
