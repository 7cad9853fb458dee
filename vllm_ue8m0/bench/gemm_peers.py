"""Products of other libraries as vLLM 0.26 calls them, as peers and context of ours.

Like peers.py, it imports vLLM when a peer is first called, and nothing that serves imports it.

  deepgemm     DeepGEMM's fp8_gemm_nt: activation scales column-major, aligned for TMA
  cutlass      vLLM's CUTLASS kernel: activation scales column-major
  triton       vLLM's block-scaled Triton kernel, in the configuration that vLLM has for the shape
  flashinfer   FlashInfer's product of bf16 activations, which vLLM takes below 32 rows: it
               quantizes inside, and with float32 scales
  vllm_quant_* vLLM's group quantizer, then one of these products: two kernels

They take scales in float32 only, which are powers of two where ours are bytes: the same values.
Every kernel gets its layout ready-made, as a quantizer would have written it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..codec import scale_to_float
from ..formats import BLOCK
from ..layouts import to_layout
from . import roof
from .case import Inputs, Operator, Outputs
from .peers import group_quant, loaded, require_float32_layout, vllm_op


def activation_scales(a_s: torch.Tensor) -> Inputs:
    """Row-major scales [M, ceil(K/128)], uint8 or float32, as the products want them."""
    scales = scale_to_float(a_s)
    # Of one row too the strides are these, which `.t().contiguous()` would leave as they are.
    column = torch.empty_strided(scales.shape, (1, scales.shape[0]), device=scales.device)
    return {
        "a_s_row": scales,
        "a_s_column": column.copy_(scales),
        "a_s_tma": to_layout(scales, "mn_major"),
    }


def gemm(ue8m0: bool) -> dict[str, Operator]:
    """Products of inputs a [M, K] e4m3, activation_scales(...), w [N, K] e4m3, w_s float32."""
    return {
        "deepgemm": lambda t: _deepgemm(t["a"], t["a_s_tma"], t["w"], t["w_s"], ue8m0),
        "cutlass": lambda t: _cutlass(t["a"], t["a_s_column"], t["w"], t["w_s"]),
        "triton": lambda t: _triton(t["a"], t["a_s_row"], t["w"], t["w_s"]),
    }


def cublas() -> dict[str, Operator]:
    """Other work: one scale for each tensor, here 1; its inputs are a, w and that one."""
    return {
        "cublas_per_tensor_fast": lambda t: [roof.tensorwise(t["a"], t["w"], t["one"], True)],
        "cublas_per_tensor": lambda t: [roof.tensorwise(t["a"], t["w"], t["one"], False)],
    }


def linear(ue8m0: bool) -> dict[str, Operator]:
    """Quantization and product of inputs x [M, K] bf16, w [N, K] e4m3, w_s float32."""

    def deepgemm(inputs: Inputs) -> Outputs:
        q, s = group_quant(inputs["x"], ue8m0, "tma")
        return _deepgemm(q, s, inputs["w"], inputs["w_s"], ue8m0)

    def cutlass(inputs: Inputs) -> Outputs:
        q, s = group_quant(inputs["x"], ue8m0, "column_major")
        return _cutlass(q, s, inputs["w"], inputs["w_s"])

    def triton(inputs: Inputs) -> Outputs:
        q, s = group_quant(inputs["x"], ue8m0)
        return _triton(q, s, inputs["w"], inputs["w_s"])

    return {
        "vllm_quant_deepgemm": deepgemm,
        "flashinfer": _flashinfer,
        "vllm_quant_cutlass": cutlass,
        "vllm_quant_triton": triton,
    }


def _deepgemm(
    a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, w_s: torch.Tensor, ue8m0: bool
) -> Outputs:
    require_float32_layout(a)
    multiply, out = loaded(_load_deepgemm), _empty(a, w)
    multiply((a, a_s), (w, w_s), out, is_deep_gemm_e8m0_used=ue8m0)
    return [out]


def _cutlass(a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, w_s: torch.Tensor) -> Outputs:
    out = _empty(a, w)
    vllm_op("cutlass_scaled_mm")(out, a, w.t(), a_s, w_s.t(), None)
    return [out]


def _triton(a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, w_s: torch.Tensor) -> Outputs:
    return [loaded(_load_triton)(a, w, a_s, w_s, [BLOCK, BLOCK], torch.bfloat16)]


def _flashinfer(inputs: Inputs) -> Outputs:
    multiply = loaded(_load_flashinfer)
    x, w, w_s = inputs["x"], inputs["w"], inputs["w_s"]
    return [multiply(input=x, weight=w, weight_scale=w_s, out_dtype=torch.bfloat16)]


def _empty(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.empty(a.shape[0], w.shape[0], dtype=torch.bfloat16, device=a.device)


def _load_deepgemm() -> Any:
    from vllm.utils.deep_gemm import fp8_gemm_nt

    return fp8_gemm_nt


def _load_triton() -> Any:
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    return fp8_utils.w8a8_triton_block_scaled_mm


def _load_flashinfer() -> Any:
    from vllm.utils.flashinfer import flashinfer_fp8_blockscale_gemm

    return flashinfer_fp8_blockscale_gemm
