"""Public operators: check, normalize, call the torch op (library.py), which dispatches.

`act_quant`, `weight_dequant`, `fp8_gemm` have the names and argument orders of DeepSeek-V3's
`inference/kernel.py`, whose `model.py` runs unchanged on them: outputs have
`torch.get_default_dtype()`. Any scale may be uint8 or float8_e8m0fnu (UE8M0) or float32.
"""

from __future__ import annotations

from typing import Any

import torch

from . import library
from .formats import BLOCK, SF_FLOOR, SF_MAX
from .layouts import ceil_div, check_layout, grid_shape

E4M3 = torch.float8_e4m3fn
_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)
_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ops: Any = library.OPS


def act_quant(
    x: torch.Tensor,
    block_size: int = BLOCK,
    scale_fmt: str | None = None,
    *,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., K] to e4m3 in groups of block_size -> (q [..., K], s [..., ceil(K/bs)]).

    scale_fmt None: float32 scales max(amax, 1e-4) / 448. "ue8m0": uint8 scales, rounded up, and at
    least `floor`: 105 is DeepSeek's amax of 1e-4, 94 vLLM's of 1e-10. layout: "row_major",
    "mn_major" (M contiguous, padded to 16 bytes) or "mn_major_packed" (such int32 words of 4
    bytes). counts [E] int: of x [E, M, K] only the first counts[e] rows of expert e are quantized,
    the others left undefined. ValueError for what is not allowed.
    """
    _check_quant("act_quant", "x", x, block_size, scale_fmt, floor, layout, counts)
    rows = x if x.dim() > 1 else x[None]
    q, s = _ops.act_quant(rows, block_size, scale_fmt == "ue8m0", floor, layout, counts)
    return (q, s) if x.dim() > 1 else (q[0], s[0])


def silu_mul_quant(
    gate_up: torch.Tensor,
    block_size: int = BLOCK,
    scale_fmt: str | None = None,
    *,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act_quant of silu(gate) * up for gate_up [..., 2 I], gate first -> (q [..., I], s).

    silu(gate) and the product are each rounded to gate_up's dtype, as DeepSeek's
    `F.silu(w1(x)) * w3(x)` rounds them.
    """
    _check_quant("silu_mul_quant", "gate_up", gate_up, block_size, scale_fmt, floor, layout, counts)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_mul_quant: gate_up must be [..., 2 I], got {tuple(gate_up.shape)}")
    rows = gate_up if gate_up.dim() > 1 else gate_up[None]
    q, s = _ops.silu_mul_quant(rows, block_size, scale_fmt == "ue8m0", floor, layout, counts)
    return (q, s) if gate_up.dim() > 1 else (q[0], s[0])


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    block_size: int = BLOCK,
    scale_fmt: str | None = None,
    *,
    floor: int = SF_FLOOR,
    layout: str = "row_major",
    normed: bool = False,
) -> list[torch.Tensor]:
    """act_quant of RMSNorm of x [M, K], or of x + residual -> [q, s, residual?, normed?].

    With a residual the sum, rounded to x's dtype, is the next result; with `normed` the norm's
    output in x's dtype, which is what was quantized, is the last.
    """
    _check_quant("rms_norm_quant", "x", x, block_size, scale_fmt, floor, layout, None)
    K = x.shape[-1]
    if x.dim() != 2 or weight.shape != (K,):
        raise ValueError(
            "rms_norm_quant: x must be [M, K] and weight [K], got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm_quant: residual must be {tuple(x.shape)} {x.dtype} as x, got "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    out: list[torch.Tensor] = _ops.rms_norm_quant(
        x, weight, eps, residual, block_size, scale_fmt == "ue8m0", floor, layout, normed
    )
    return out


def weight_quant(
    w: torch.Tensor, scale_fmt: str | None = "ue8m0"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] in 128x128 blocks -> (q e4m3, scales [ceil(N/128), ceil(K/128)]).

    "ue8m0": uint8, the smallest power of two that holds the block; None: float32 amax / 448.
    ValueError if the weight holds NaN or Inf, which takes a wait for the GPU.
    """
    _check_scale_fmt("weight_quant", scale_fmt)
    if w.dim() != 2 or w.dtype not in _ACTIVATION_DTYPES:
        raise ValueError(
            f"weight_quant: w must be [N, K] in {_names(_ACTIVATION_DTYPES)}, got "
            f"{tuple(w.shape)} {w.dtype}"
        )
    q, s = _ops.weight_quant(w, scale_fmt == "ue8m0")
    return q, s


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


def _check_scale_fmt(op: str, scale_fmt: str | None) -> None:
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"{op}: scale_fmt is {scale_fmt!r}; allowed: None, 'ue8m0'")


def _check_quant(
    op: str, name: str, x: torch.Tensor, block_size: int, scale_fmt: str | None, floor: int,
    layout: str, counts: torch.Tensor | None,
) -> None:  # fmt: skip
    _check_scale_fmt(op, scale_fmt)
    check_layout(layout, scale_fmt == "ue8m0")
    if block_size < 32 or block_size & (block_size - 1):
        raise ValueError(f"{op}: block_size is {block_size}; allowed: powers of two from 32")
    if not 0 <= floor <= SF_MAX:
        raise ValueError(f"{op}: floor is {floor}; allowed: scale bytes 0 to {SF_MAX}")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise ValueError(f"{op}: {name} is {x.dtype}; allowed: {_names(_ACTIVATION_DTYPES)}")
    if x.dim() < 2 and layout != "row_major":
        raise ValueError(f"{op}: layout {layout!r} needs {name} [M, K] or [E, M, K]")
    if counts is not None and (x.dim() != 3 or counts.shape != x.shape[:1]):
        raise ValueError(
            f"{op}: counts must be [E] for {name} [E, M, K], got {tuple(counts.shape)} for "
            f"{tuple(x.shape)}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))


def _check_scale(op: str, name: str, scale: torch.Tensor, shape: tuple[int, ...], of: str) -> None:
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{op}: {name} is {scale.dtype}; allowed: {_names(_SCALE_DTYPES)}")
    if tuple(scale.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must be {tuple(shape)} for {of}, got {tuple(scale.shape)}; "
            "transposed or truncated scales?"
        )
