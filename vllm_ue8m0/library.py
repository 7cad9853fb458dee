"""The operators as torch ops `vllm_ue8m0::*`, which the vLLM glue traces.

Each has a fake implementation and, but for `weight_quant`, never synchronizes with the host on a
GPU. Arguments are those of `reference`; `experts` and `batched_experts` write to a tensor given
first, `rotary_embedding` changes its first two and a cache, the others mutate nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from .formats import BLOCK, SF_FLOOR
from .kernels import replay
from .layouts import ceil_div, empty_scale, grid_shape

E4M3 = torch.float8_e4m3fn

_LIBRARY = torch.library.Library("vllm_ue8m0", "FRAGMENT")
_QUANT = f', int group={BLOCK}, bool ue8m0=False, int floor={SF_FLOOR}, str layout="row_major"'
_ROWS = ", Tensor? counts=None, Tensor? destinations=None, int? out_rows=None"
_SCHEMAS = {
    "act_quant": f"(Tensor x{_QUANT}{_ROWS}) -> (Tensor, Tensor)",
    "silu_mul_quant": f"(Tensor gate_up{_QUANT}{_ROWS}) -> (Tensor, Tensor)",
    "rms_norm_quant": "(Tensor x, Tensor weight, float eps, Tensor? residual=None"
    f"{_QUANT}, bool normed=False) -> Tensor[]",
    "add_rms_norm": "(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> Tensor[]",
    "weight_quant": "(Tensor w, bool ue8m0) -> (Tensor, Tensor)",
    "weight_dequant": "(Tensor w, Tensor sf, int[] gran, Tensor? c, ScalarType out_dtype)"
    " -> Tensor",
    "gemm": "(Tensor a, Tensor a_s, Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran,"
    " ScalarType out_dtype) -> Tensor",
    "linear": "(Tensor x, Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran,"
    " str activation_scale) -> Tensor",
    "norm_linear": "(Tensor x, Tensor norm_weight, float eps, Tensor? residual, bool normed,"
    " Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran, str activation_scale,"
    " Tensor? shared=None, float factor=1.0) -> Tensor[]",
    "latent_linear": "(Tensor x, Tensor norm_weight, float eps, Tensor side_weight, float side_eps,"
    " Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran, str activation_scale) -> Tensor[]",
    "rotary_embedding": "(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin,"
    " Tensor? latent=None, Tensor(c!)? cache=None, Tensor? slots=None) -> ()",
    "silu_mul_linear": "(Tensor gate_up, Tensor w, Tensor sf, Tensor? c, Tensor? bias, int[] gran,"
    " str activation_scale) -> Tensor",
    "experts": "(Tensor(a!) out, Tensor x, Tensor w13, Tensor sf13, Tensor? c13, Tensor w2,"
    " Tensor sf2, Tensor? c2, Tensor topk_weights, Tensor topk_ids, int[] gran13, int[] gran2,"
    " str activation_scale, bool weight_on_input, Tensor? expert_map=None) -> ()",
    "batched_experts": "(Tensor(a!) out, Tensor x, Tensor w13, Tensor sf13, Tensor? c13,"
    " Tensor w2, Tensor sf2, Tensor? c2, Tensor counts, int[] gran13, int[] gran2,"
    " str activation_scale) -> ()",
}


def _fake_act_quant(
    x: torch.Tensor, group: int = BLOCK, ue8m0: bool = False, floor: int = SF_FLOOR,
    layout: str = "row_major", counts: Any = None, destinations: Any = None,
    out_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    *leading, M = x.shape[:-1] if out_rows is None else (out_rows,)
    K = x.shape[-1]
    scale = empty_scale(leading, M, ceil_div(K, group), ue8m0, layout, x.device)
    return x.new_empty((*leading, M, K), dtype=E4M3), scale


def _fake_silu_mul_quant(
    gate_up: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_act_quant(gate_up[..., : gate_up.shape[-1] // 2], *args, **kwargs)


def _fake_rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None,
    group: int = BLOCK, ue8m0: bool = False, floor: int = SF_FLOOR, layout: str = "row_major",
    normed: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    extra = (residual is not None) + normed
    return [
        *_fake_act_quant(x, group, ue8m0, floor, layout),
        *(x.new_empty(x.shape) for _ in range(extra)),
    ]


def _fake_add_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for _ in range(1 if residual is None else 2)]


def _fake_weight_quant(w: torch.Tensor, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    grid = grid_shape(w.shape[0], w.shape[1], (BLOCK, BLOCK))
    scale_dtype = torch.uint8 if ue8m0 else torch.float32
    return w.new_empty(w.shape, dtype=E4M3), w.new_empty(grid, dtype=scale_dtype)


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


def _fake_norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, residual: torch.Tensor | None,
    normed: bool, w: torch.Tensor, *rest: Any, **more: Any,
) -> list[torch.Tensor]:  # fmt: skip
    extra = (residual is not None) + normed
    return [_fake_linear(x, w), *(x.new_empty(x.shape) for _ in range(extra))]


def _fake_latent_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, side_weight: torch.Tensor,
    side_eps: float, w: torch.Tensor, *rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    M, columns = x.shape
    L = side_weight.shape[0]
    widths = w.shape[0], L, columns - norm_weight.shape[0] - L
    return [x.new_empty((M, width)) for width in widths]


def _fake_in_place(changed: torch.Tensor, *rest: Any, **more: Any) -> None:
    pass


_FAKES = {
    "act_quant": _fake_act_quant,
    "silu_mul_quant": _fake_silu_mul_quant,
    "rms_norm_quant": _fake_rms_norm_quant,
    "add_rms_norm": _fake_add_rms_norm,
    "weight_quant": _fake_weight_quant,
    "weight_dequant": _fake_weight_dequant,
    "gemm": _fake_gemm,
    "linear": _fake_linear,
    "norm_linear": _fake_norm_linear,
    "latent_linear": _fake_latent_linear,
    "rotary_embedding": _fake_in_place,
    "silu_mul_linear": _fake_linear,
    "experts": _fake_in_place,
    "batched_experts": _fake_in_place,
}


# Operators of the same backend.
_PART_OF = dict.fromkeys(("norm_linear", "latent_linear", "silu_mul_linear"), "linear")
_PART_OF["rotary_embedding"] = "add_rms_norm"


# Of a model's layers.
_REPLAYED = ("add_rms_norm", "gemm", "linear", *_PART_OF, "experts")


def _register(name: str) -> None:
    chosen = _PART_OF.get(name, name)
    writes = _SCHEMAS[name].startswith("(Tensor(a!) out")

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        operator = getattr(dispatch.choose(chosen, x.device.type).load(), name)
        if writes:
            operator(*args, **kwargs, out=x)
            return None
        return operator(x, *args, **kwargs)

    def replayed(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        operator = getattr(dispatch.choose(chosen, x.device.type).load(), name)
        if writes:
            replay.run(operator, *args, **kwargs, out=x)
            return None
        return replay.run(operator, x, *args, **kwargs)

    _LIBRARY.define(name + _SCHEMAS[name])
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, replayed if name in _REPLAYED else run, "CUDA")
    torch.library.register_fake(f"vllm_ue8m0::{name}", _FAKES[name], lib=_LIBRARY)  # type: ignore[arg-type]


for _name in _SCHEMAS:
    _register(_name)
OPS: Any = torch.ops.vllm_ue8m0
