"""Public operators: check, normalize, dispatch; registered as torch ops `vllm_ue8m0::*`.

`act_quant`, `weight_dequant`, `fp8_gemm` have the names and argument orders of DeepSeek-V3's
`inference/kernel.py`, whose `model.py` runs unchanged on them: outputs have
`torch.get_default_dtype()`. Any scale may be uint8 or float8_e8m0fnu (UE8M0) or float32.
The ops underneath take 2-D activations and are what the vLLM glue traces; each has a fake
implementation, mutates nothing, and never synchronizes with the host on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from .formats import BLOCK
from .layouts import ceil_div, grid_shape

E4M3 = torch.float8_e4m3fn
_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LIBRARY = torch.library.Library("vllm_ue8m0", "FRAGMENT")
_SCHEMAS = {
    "act_quant": "(Tensor x, int group, bool ue8m0) -> (Tensor, Tensor)",
    "weight_dequant": "(Tensor w, Tensor sf, int[] gran, Tensor? c, ScalarType out_dtype)"
    " -> Tensor",
    "gemm": "(Tensor a, Tensor a_s, Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran,"
    " ScalarType out_dtype) -> Tensor",
    "linear": "(Tensor x, Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran,"
    " str activation_scale) -> Tensor",
    "experts": "(Tensor x, Tensor w13, Tensor sf13, Tensor? c13, Tensor w2, Tensor sf2,"
    " Tensor? c2, Tensor topk_weights, Tensor topk_ids, int[] gran13, int[] gran2,"
    " str activation_scale, bool weight_on_input) -> Tensor",
}


def _fake_act_quant(x: torch.Tensor, group: int, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    groups = ceil_div(x.shape[-1], group)
    scale_dtype = torch.uint8 if ue8m0 else torch.float32
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((*x.shape[:-1], groups), dtype=scale_dtype)


def _fake_weight_dequant(
    w: torch.Tensor, sf: torch.Tensor, gran: list[int], c: Any, out_dtype: torch.dtype
) -> torch.Tensor:
    return w.new_empty(w.shape, dtype=out_dtype)


def _fake_gemm(
    a: torch.Tensor, a_s: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, c: Any, bias: Any,
    gran: list[int], out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], w.shape[0]), dtype=out_dtype)


def _fake_linear(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


def _fake_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x)


_FAKES = {
    "act_quant": _fake_act_quant,
    "weight_dequant": _fake_weight_dequant,
    "gemm": _fake_gemm,
    "linear": _fake_linear,
    "experts": _fake_experts,
}


def _register(name: str) -> None:
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(dispatch.choose(x.device.type).load(), name)(x, *args, **kwargs)

    _LIBRARY.define(name + _SCHEMAS[name])
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"vllm_ue8m0::{name}", _FAKES[name], lib=_LIBRARY)  # type: ignore[arg-type]


for _name in _SCHEMAS:
    _register(_name)
_ops: Any = torch.ops.vllm_ue8m0


def act_quant(
    x: torch.Tensor, block_size: int = BLOCK, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] to e4m3 in groups of block_size -> (q [..., K], s [..., ceil(K/bs)]).

    scale_fmt None: float32 scales max(amax, 1e-4) / 448. "ue8m0": uint8 scales, rounded up.
    """
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"act_quant: scale_fmt is {scale_fmt!r}; allowed: None, 'ue8m0'")
    if block_size < 32 or block_size & (block_size - 1):
        raise ValueError(f"act_quant: block_size is {block_size}; allowed: powers of two from 32")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise ValueError(
            f"act_quant: x is {x.dtype}; allowed: {', '.join(map(str, _ACTIVATION_DTYPES))}"
        )
    q, s = _ops.act_quant(x.reshape(-1, x.shape[-1]), block_size, scale_fmt == "ue8m0")
    return q.view(x.shape), s.view(*x.shape[:-1], s.shape[-1])


def weight_dequant(x: torch.Tensor, s: torch.Tensor, block_size: int = BLOCK) -> torch.Tensor:
    """Dequantize a weight x [M, N] e4m3, s [ceil(M/bs), ceil(N/bs)] to the default dtype."""
    if x.dim() != 2 or x.dtype != E4M3:
        raise ValueError(
            f"weight_dequant: x must be a 2-D {E4M3} weight, got {tuple(x.shape)} {x.dtype}"
        )
    gran = (block_size, block_size)
    _check_scale(
        "weight_dequant", "s", s, grid_shape(x.shape[0], x.shape[1], gran), f"x {tuple(x.shape)}"
    )
    out: torch.Tensor = _ops.weight_dequant(x, as_scale(s), gran, None, torch.get_default_dtype())
    return out


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor
) -> torch.Tensor:
    """a [..., K] e4m3 (1x128 scales a_s) times b [N, K] e4m3 (128x128 scales b_s) transposed.

    Returns [..., N] in the default dtype. Scales may be uint8, float8_e8m0fnu or float32, mixed
    freely; K and N need not be multiples of 128.
    """
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != E4M3:
            raise ValueError(f"fp8_gemm: {name} must be {E4M3}, got {tensor.dtype}")
    if b.dim() != 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"fp8_gemm: b must be [N, K] with a's K, got a {tuple(a.shape)}, b {tuple(b.shape)}"
        )
    K, gran = a.shape[-1], (BLOCK, BLOCK)
    groups = (*a.shape[:-1], ceil_div(K, BLOCK))
    _check_scale("fp8_gemm", "a_s", a_s, groups, f"a {tuple(a.shape)}")
    _check_scale(
        "fp8_gemm", "b_s", b_s, grid_shape(b.shape[0], b.shape[1], gran), f"b {tuple(b.shape)}"
    )
    out: torch.Tensor = _ops.gemm(
        a.reshape(-1, K), as_scale(a_s).reshape(-1, groups[-1]), b, as_scale(b_s),
        None, None, gran, torch.get_default_dtype(),
    )  # fmt: skip
    return out.view(*a.shape[:-1], b.shape[0])


def as_scale(scale: torch.Tensor) -> torch.Tensor:
    """The dtypes kernels take: uint8 or float32. e8m0 is viewed as bytes, never cast."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _check_scale(op: str, name: str, scale: torch.Tensor, shape: tuple[int, ...], of: str) -> None:
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{op}: {name} is {scale.dtype}; allowed: {', '.join(map(str, _SCALE_DTYPES))}"
        )
    if tuple(scale.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must be {tuple(shape)} for {of}, got {tuple(scale.shape)}; "
            "transposed or truncated scales?"
        )
