"""Every operator in plain torch: the definition, the CPU backend, and the tests' oracle.

Shapes and layouts (all row-major, but activation scales in the other layouts of layouts.py):
  x [..., K] float            a [..., K] e4m3           a_s [..., ceil(K/gk)]
  w [..., N, K] e4m3          sf [..., ceil(N/gn), ceil(K/gk)] uint8 | e8m0 | float32
  c [..., ceil(N/gn)] float32, optional: a factor of the output rows of each scale row
gran = (gn, gk) is the granularity of a weight's scale grid, 128x128 unless a shard cuts a block;
activation groups are 1 x gk. The last group or block may be partial.
"""

from .products import (
    batched_experts,
    experts,
    gemm,
    latent_linear,
    linear,
    matmul,
    norm_linear,
    silu_mul_linear,
)
from .quant import (
    act_quant,
    add_rms_norm,
    dequantize,
    dequantize_activations,
    e4m3_to_float,
    fake_quant,
    rms_norm,
    rms_norm_quant,
    silu_mul,
    silu_mul_quant,
    weight_dequant,
    weight_quant,
)
from .rotary import rotary_embedding

__all__ = [
    "act_quant",
    "add_rms_norm",
    "batched_experts",
    "dequantize",
    "dequantize_activations",
    "e4m3_to_float",
    "experts",
    "fake_quant",
    "gemm",
    "latent_linear",
    "linear",
    "matmul",
    "norm_linear",
    "rms_norm",
    "rms_norm_quant",
    "rotary_embedding",
    "silu_mul",
    "silu_mul_linear",
    "silu_mul_quant",
    "weight_dequant",
    "weight_quant",
]
