"""The sm_90 backend (H100, H200): Gluon kernels for products, dense and of experts.

The operators it has take what `reference` and `portable` take; what its kernels do not cover
(`products.refusal`, `experts.refusal`) goes to `portable`. Beside them it has `bmm` and `gate`, of
16-bit numbers; what these do not cover (`bmm_refusal`, `gate_refusal`) is torch's.
"""

from .batched import bmm, bmm_plan, bmm_refusal, bmm_shape_fits
from .experts import batched_experts, experts, experts_plan
from .experts import refusal as experts_refusal
from .gate import gate, gate_refusal
from .products import (
    GEMM_SCALE_LAYOUT,
    describe,
    gemm,
    latent_linear,
    linear,
    linear_plan,
    norm_linear,
    refusal,
    silu_mul_linear,
)

__all__ = [
    "GEMM_SCALE_LAYOUT",
    "batched_experts",
    "bmm",
    "bmm_plan",
    "bmm_refusal",
    "bmm_shape_fits",
    "describe",
    "experts",
    "experts_plan",
    "experts_refusal",
    "gate",
    "gate_refusal",
    "gemm",
    "latent_linear",
    "linear",
    "linear_plan",
    "norm_linear",
    "refusal",
    "silu_mul_linear",
]
