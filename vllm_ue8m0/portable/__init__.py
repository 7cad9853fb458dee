"""The portable backend: Triton kernels, also run by Triton's CPU interpreter.

Same operators, signatures and results as `reference`; these modules allocate outputs, route, and
launch. Nothing here waits for the device, so that everything can be captured in a CUDA graph, but
`weight_quant`, which refuses NaN. All run on sm_80 and newer.
"""

from .plans import experts_plan, linear_plan
from .products import (
    batched_experts,
    describe,
    experts,
    gemm,
    latent_linear,
    linear,
    norm_linear,
    silu_mul_linear,
)
from .quant import (
    act_quant,
    add_rms_norm,
    describe_quant,
    rms_norm_quant,
    silu_mul_quant,
    weight_dequant,
    weight_quant,
    weight_quant_unchecked,
)
from .rotary import rotary_embedding

__all__ = [
    "act_quant",
    "add_rms_norm",
    "batched_experts",
    "describe",
    "describe_quant",
    "experts",
    "experts_plan",
    "gemm",
    "latent_linear",
    "linear",
    "linear_plan",
    "norm_linear",
    "rms_norm_quant",
    "rotary_embedding",
    "silu_mul_linear",
    "silu_mul_quant",
    "weight_dequant",
    "weight_quant",
    "weight_quant_unchecked",
]
