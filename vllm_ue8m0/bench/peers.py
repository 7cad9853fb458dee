"""vLLM's CUDA operators, as peers and context of ours (signatures of vLLM 0.26).

Besides plugin/compat.py, only the modules of peers import vLLM: they measure its kernels, and
nothing that serves imports them. vLLM is imported when a peer is first called; what is missing, or
refuses, raises, and the caller reports that peer as absent. Each function gives (peers, context) by
name:

  vllm              the group quantizer
  vllm_pair         two kernels, the elementwise operator and then the group quantizer
  vllm_fused        one kernel, float32 scales only (as context: vllm_fused_fp32)
  vllm_masked       the masked MoE kernel (with float32 scales, as context: vllm_masked_fp32)

vLLM's row-major UE8M0 scales are powers of two in float32, four times our bytes: the same work all
the same. `fused_add_rms_norm` and `rms_norm_per_block_quant` add into the residual in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from ..layouts import ceil_div
from .case import Inputs, Operator, Outputs

E4M3 = torch.float8_e4m3fn
GROUP = 128
HOPPER = 9
_QUANT_ARGUMENTS = (GROUP, 1e-10, -448.0, 448.0)  # group, eps, smallest and largest code
Peers = tuple[dict[str, Operator], dict[str, Operator]]


class PeerAbsent(RuntimeError):
    """The peer cannot run here; the text is the reason."""


def act_quant(ue8m0: bool, layout: str) -> Peers:
    def call(inputs: Inputs) -> Outputs:
        return group_quant(inputs["x"], ue8m0, "row_major" if layout == "row_major" else "tma")

    def packed(inputs: Inputs) -> Outputs:
        return _group_quant_packed(inputs["x"])

    if layout == "row_major":
        return {"vllm": call}, {}
    if layout == "mn_major":  # its column-major scales take float32's size
        return {}, {"vllm_column_major_fp32": call}
    return {"vllm": packed}, {}


def silu_mul_quant(ue8m0: bool) -> Peers:
    def pair(inputs: Inputs) -> Outputs:
        gate_up = inputs["gate_up"]
        M, columns = gate_up.shape
        product = torch.empty(M, columns // 2, dtype=gate_up.dtype, device=gate_up.device)
        vllm_op("silu_and_mul")(product, gate_up)
        return group_quant(product, ue8m0)

    def fused(inputs: Inputs) -> Outputs:
        gate_up = inputs["gate_up"]
        q, s = _empty(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
        vllm_op("silu_and_mul_per_block_quant")(q, gate_up, s, GROUP, None, False)
        return [q, s]

    return _pair_and_fused(ue8m0, pair, fused)


def masked_silu_mul_quant() -> Peers:
    def call(ue8m0: bool, inputs: Inputs) -> Outputs:
        gate_up = inputs["gate_up"]  # [E, T, 2 I]
        E, T, columns = gate_up.shape
        width, dtype = columns // 2 // GROUP, torch.float32
        if ue8m0:
            width, dtype = ceil_div(width, 4), torch.int32
        q = torch.empty(E, T, columns // 2, dtype=E4M3, device=gate_up.device)
        strides = (T * width, 1, T)
        s = torch.empty_strided((E, T, width), strides, dtype=dtype, device=gate_up.device)
        vllm_op("persistent_masked_m_silu_mul_quant")(gate_up, inputs["counts"], q, s, ue8m0)
        return [q, s]

    return {"vllm_masked": partial(call, True)}, {"vllm_masked_fp32": partial(call, False)}


def rms_norm_quant(ue8m0: bool, eps: float) -> Peers:
    def pair(inputs: Inputs) -> Outputs:
        x, residual = inputs["x"], inputs.get("residual")
        if residual is None:
            normed = torch.empty_like(x)
            vllm_op("rms_norm")(normed, x, inputs["weight"], eps)
        else:
            normed = x
            vllm_op("fused_add_rms_norm")(x, residual, inputs["weight"], eps)
        return group_quant(normed, ue8m0)

    def fused(inputs: Inputs) -> Outputs:
        x = inputs["x"]
        q, s = _empty(x.shape[0], x.shape[1], x.device)
        vllm_op("rms_norm_per_block_quant")(
            q, x, inputs["weight"], s, eps, None, inputs.get("residual"), GROUP, False
        )
        return [q, s]

    return _pair_and_fused(ue8m0, pair, fused)


def _pair_and_fused(ue8m0: bool, pair: Operator, fused: Operator) -> Peers:
    """The fused kernels cannot round scales to powers of two: other work beside UE8M0."""
    if ue8m0:
        return {"vllm_pair": pair}, {"vllm_fused_fp32": fused}
    return {"vllm_pair": pair, "vllm_fused": fused}, {}


def group_quant(x: torch.Tensor, ue8m0: bool, layout: str = "row_major") -> Outputs:
    """per_token_group_quant_fp8 of vLLM: codes of x [M, K], float32 scales [M, K/128].

    layout: of the scales; "row_major", "column_major", or "tma", which is that with columns padded
    to 16 bytes.
    """
    q, s = _empty(x.shape[0], x.shape[1], x.device)
    if layout != "row_major":
        columns = ceil_div(x.shape[0], 4) * 4 if layout == "tma" else x.shape[0]
        s = torch.empty_strided(s.shape, (1, columns), dtype=torch.float32, device=x.device)
    column_major, tma = layout != "row_major", layout == "tma"
    vllm_op("per_token_group_fp8_quant")(x, q, s, *_QUANT_ARGUMENTS, ue8m0, column_major, tma)
    return [q, s]


def _group_quant_packed(x: torch.Tensor) -> Outputs:
    M, K = x.shape
    q = torch.empty(M, K, dtype=E4M3, device=x.device)
    shape, strides = (M, ceil_div(K // GROUP, 4)), (1, ceil_div(M, 4) * 4)
    s = torch.empty_strided(shape, strides, dtype=torch.int32, device=x.device)
    vllm_op("per_token_group_fp8_quant_packed")(x, q, s, *_QUANT_ARGUMENTS)
    return [q, s]


def _empty(M: int, K: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(M, K, dtype=E4M3, device=device)
    return q, torch.empty(M, K // GROUP, dtype=torch.float32, device=device)


def vllm_op(name: str) -> Any:
    """torch.ops._C.NAME of the installed vLLM; PeerAbsent says why there is none."""
    reason = _import_error()
    if reason is not None:
        raise PeerAbsent(reason)
    try:
        return getattr(torch.ops._C, name)
    except AttributeError:
        raise PeerAbsent(f"this vLLM has no operator torch.ops._C.{name}") from None


@cache
def _import_error() -> str | None:
    """Import vLLM's operators, once; the reason if that fails."""
    try:
        import vllm._custom_ops  # noqa: F401
    except Exception as error:  # a broken install raises anything
        return f"vLLM cannot be imported: {type(error).__name__}: {error}"
    return None


def loaded(load: Callable[[], Any]) -> Any:
    """What load() imports; PeerAbsent says why it cannot."""
    found, reason = _try(load)
    if reason is not None:
        raise PeerAbsent(reason)
    return found


@cache
def _try(load: Callable[[], Any]) -> tuple[Any, str | None]:
    """What load gives, and why it failed: an import is tried once, and by a capture never."""
    try:
        return load(), None
    except Exception as error:  # a broken install raises anything
        return None, f"cannot be imported: {type(error).__name__}: {error}"


def require_float32_layout(tensor: torch.Tensor) -> None:
    """PeerAbsent where DeepGEMM would first convert float32 scales, in every call."""
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] != HOPPER:
        raise PeerAbsent("float32 scales are DeepGEMM's layout on sm_90 only")
