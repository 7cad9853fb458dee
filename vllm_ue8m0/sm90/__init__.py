"""The sm_90 backend (H100, H200): Gluon kernels for the dense products.

The operators it has take what `reference` and `portable` take; what its kernels do not cover
(`products.refusal`) goes to `portable`.
"""

from .products import GEMM_SCALE_LAYOUT, describe, gemm, linear, refusal

__all__ = ["GEMM_SCALE_LAYOUT", "describe", "gemm", "linear", "refusal"]
