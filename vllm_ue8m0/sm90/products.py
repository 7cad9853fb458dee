"""Dense products: which kernel multiplies what, and launching it.

M <= 64      decode_gemm; `linear` quantizes inside it where that is faster (hopper_config); a norm
             or silu_mul before it quantizes at no cost
M > 64       prefill_gemm
otherwise    portable's kernels: see `refusal`
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from .. import portable
from ..formats import BLOCK, SF_FLOOR
from ..kernels import decode_gemm, prefill_gemm
from ..kernels.config import act_quant_config, batch_invariant
from ..kernels.hopper import column_major
from ..kernels.hopper_config import (
    MAX_DECODE_ROWS,
    MAX_K,
    PREFILL_ROWS,
    DecodeConfig,
    PrefillConfig,
    decode_config,
    device_of,
    prefill_config,
)
from ..layouts import ceil_div, to_layout
from ..portable.quant import kernel_scale, latent_norm_quant, unit_stride
from .counters import counters

E4M3 = torch.float8_e4m3fn
# The layout of activation scales that needs no conversion here.
GEMM_SCALE_LAYOUT = "mn_major"


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
    a = unit_stride(a)
    if a_s is None or refusal(a, w, sf, gran) is not None:
        return portable.gemm(a, a_s, w, sf, c, bias, gran, out_dtype)
    out = torch.empty(a.shape[0], w.shape[0], dtype=out_dtype, device=a.device)
    if out.numel():
        config = _config(a, w, linear=False)
        _launch(a, kernel_scale(a_s), w, sf, c, bias, out, config)
    return out


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
    x = unit_stride(x)
    if refusal(x, w, sf, gran, activation_scale) is not None:
        return portable.linear(x, w, sf, c, bias, gran, activation_scale)
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    config, ue8m0 = _config(x, w, linear=True), activation_scale == "ue8m0"
    if isinstance(config, DecodeConfig) and config.fused:
        a, a_s = x, None
    else:
        a, a_s = portable.act_quant(x, BLOCK, ue8m0, layout=GEMM_SCALE_LAYOUT)
    _launch(a, a_s, w, sf, c, bias, out, config, ue8m0)
    return out


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
    """linear of a norm, which quantizes; see reference.norm_linear."""
    if refusal(x, w, sf, gran, activation_scale) is not None:
        return portable.norm_linear(
            x, norm_weight, eps, residual, normed, w, sf, c, bias, gran, activation_scale, shared,
            factor,
        )  # fmt: skip
    a, a_s, *rest = portable.rms_norm_quant(
        x, norm_weight, eps, residual, BLOCK, activation_scale == "ue8m0",
        layout=GEMM_SCALE_LAYOUT, normed=normed, shared=shared, factor=factor,
    )  # fmt: skip
    return [gemm(a, a_s, w, sf, c, bias, gran, x.dtype), *rest]


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
    """linear of a norm, which quantizes, beside another; see reference.latent_linear."""
    if refusal(x, w, sf, gran, activation_scale) is not None:
        return portable.latent_linear(
            x, norm_weight, eps, side_weight, side_eps, w, sf, c, bias, gran, activation_scale
        )
    a, a_s, *beside = latent_norm_quant(
        x, norm_weight, eps, side_weight, side_eps, BLOCK, activation_scale == "ue8m0",
        GEMM_SCALE_LAYOUT,
    )  # fmt: skip
    return [gemm(a, a_s, w, sf, c, bias, gran, x.dtype), *beside]


def silu_mul_linear(
    gate_up: torch.Tensor,
    w: torch.Tensor,
    sf: torch.Tensor,
    c: torch.Tensor | None,
    bias: torch.Tensor | None,
    gran: Sequence[int],
    activation_scale: str,
) -> torch.Tensor:
    """linear of silu_mul, which quantizes."""
    if refusal(gate_up, w, sf, gran, activation_scale) is not None:
        return portable.silu_mul_linear(gate_up, w, sf, c, bias, gran, activation_scale)
    ue8m0 = activation_scale == "ue8m0"
    a, a_s = portable.silu_mul_quant(gate_up, BLOCK, ue8m0, layout=GEMM_SCALE_LAYOUT)
    return gemm(a, a_s, w, sf, c, bias, gran, gate_up.dtype)


def linear_plan(
    x: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, gran: Sequence[int], activation_scale: str
) -> Callable[[int], Hashable]:
    """What `linear` and `norm_linear` launch, by the number of rows: equal plans are equal kernels
    (warmup.py).
    """
    if refusal(x, w, sf, gran, activation_scale) is not None:
        return portable.linear_plan(x, w, sf, gran, activation_scale)
    (N, K), index = w.shape, x.device.index

    def plan(M: int) -> Hashable:
        config, of_codes = (_choose(M, N, K, linear, index) for linear in (True, False))
        if isinstance(config, DecodeConfig) and config.fused:
            return config, of_codes
        return config, of_codes, act_quant_config(M, ceil_div(K, BLOCK), True)

    return plan


def refusal(
    a: torch.Tensor, w: torch.Tensor, sf: torch.Tensor, gran: Sequence[int],
    activation_scale: str = "ue8m0",
) -> str | None:  # fmt: skip
    """Why the sm_90 kernels do not multiply these, or None. a has unit stride along K.

    w and sf are read as they are: the kernels start on them before they wait for others, also for
    a copy that would be made here.
    """
    if activation_scale == "none":
        return "activations are not quantized"
    if (gran[0], gran[1]) != (BLOCK, BLOCK):
        return f"scale blocks of {gran[0]}x{gran[1]}, not {BLOCK}x{BLOCK}"
    if sf.dtype not in (torch.uint8, torch.float32) or sf.stride(1) != 1:
        return f"scales of w are {sf.dtype} with strides {sf.stride()}"
    codes = [("w", w)] if a.dtype != E4M3 else [("a", a), ("w", w)]
    for name, matrix in codes:
        rows, columns = matrix.stride()
        if columns != 1 or (rows < matrix.shape[1] and matrix.shape[0] > 1):
            return f"{name} has strides {rows}, {columns}"
        # The copy engine reads rows that start at multiples of 16 bytes.
        if matrix.data_ptr() % 16 or rows % 16:
            return f"rows of {name} do not start at multiples of 16 bytes"
    K = w.shape[1]
    if a.dtype != E4M3 and K % 16:  # rows of the codes that act_quant makes of them
        return f"K is {K}, not a multiple of 16"
    if K > MAX_K:
        return f"K is {K}; the scales of more than {MAX_K} do not fit into shared memory"
    return None


def describe(op: str, M: int, N: int, K: int) -> str:
    """The kernel and configuration of an operator on the current GPU, for people."""
    config = _choose(M, N, K, op == "linear", torch.cuda.current_device())
    before = ", act_quant before" if op == "linear" else ""
    if isinstance(config, DecodeConfig):
        name = "sm90 decode_gemm"
        sizes = f"{config.block_n}x{config.tokens}, {config.programs} programs"
        before = ", fused" if config.fused else before
    else:
        name, sizes = "sm90 prefill_gemm", f"{config.block_m}x{config.block_n}"
    return f"{name} {sizes}, {config.stages} stages, splits {config.splits}{before}"


def _config(a: torch.Tensor, w: torch.Tensor, linear: bool) -> DecodeConfig | PrefillConfig:
    return _choose(a.shape[0], w.shape[0], w.shape[1], linear, a.device.index)


def _choose(M: int, N: int, K: int, linear: bool, index: int) -> DecodeConfig | PrefillConfig:
    if M <= MAX_DECODE_ROWS:
        return decode_config(M, N, K, linear, batch_invariant(), index)
    # A part of a tile costs what a whole one does. So one number of rows for each number of tiles
    # shows a warm-up every configuration.
    M = ceil_div(M, PREFILL_ROWS) * PREFILL_ROWS
    return prefill_config(M, N, K, batch_invariant(), index)


def _launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
    config: DecodeConfig | PrefillConfig, ue8m0: bool = True,
) -> None:  # fmt: skip
    """a: codes with scales a_s, or, if the configuration is fused, activations for `ue8m0`."""
    M, N = out.shape
    if isinstance(config, DecodeConfig):
        count = counters(w, ceil_div(N, config.block_n)) if config.splits > 1 else None
        decode_gemm.launch(a, a_s, w, sf, c, bias, out, config, count, ue8m0, SF_FLOOR)
        return
    assert a_s is not None
    if not column_major(a_s):
        a_s = to_layout(a_s, GEMM_SCALE_LAYOUT)
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
    count = counters(w, 2 * tiles) if config.splits > 1 else None
    _, sms = device_of(a.device.index)
    prefill_gemm.launch(a, a_s, w, sf, c, bias, out, config, count, sms)
