"""The sm_100 backend (B200, B300): products whose scales the tensor cores apply themselves.

The operators are portable's, with its kernels' `block_scaled` where both operands have scale bytes;
what else there is (`refusal`, `experts_refusal`) goes to `portable` as it is. Nothing of this has
run on a GPU yet: it is compiled for sm_100, and its results are those of Triton's interpreter.
"""

from .products import (
    batched_experts,
    describe,
    experts,
    experts_plan,
    experts_refusal,
    gemm,
    latent_linear,
    linear,
    linear_plan,
    norm_linear,
    refusal,
    silu_mul_linear,
)

__all__ = [
    "batched_experts",
    "describe",
    "experts",
    "experts_plan",
    "experts_refusal",
    "gemm",
    "latent_linear",
    "linear",
    "linear_plan",
    "norm_linear",
    "refusal",
    "silu_mul_linear",
]
