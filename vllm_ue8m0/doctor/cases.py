"""Small inputs for every operator of the dispatch table, drawn the same every time.

Sizes are odd where an operator allows it, with a last group or block that is not whole; rows are
few and many, because other kernels run them; scales are bytes and float32, with and without c.
Rows of K codes are multiples of 16 bytes, without which sm_90 hands over to portable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from ..agreement import EXPERTS_DIFF, INEXACT, PRODUCT_DIFF
from ..formats import BLOCK, FP8_MAX
from ..layouts import SCALE_LAYOUTS, ceil_div, grid_shape

E4M3, U8, F32, BF16 = torch.float8_e4m3fn, torch.uint8, torch.float32, torch.bfloat16
GRAN = (BLOCK, BLOCK)
SEED = 20261123
# Rows where a share of the codes may differ: a scale that does takes several codes with it.
FEW = 9


@dataclass(frozen=True)
class Case:
    """Arguments of one call, on the CPU, and what its results may differ in from the reference.

    tolerance  of a quantizer as in agreement.differs; of a product as calc_diff
    names      of the results of a quantizer; empty for a product
    by_row     whether every row of a product has to be within the tolerance, or all together
    counts     rows of each expert that have a defined value; None: all
    """

    text: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    names: tuple[str, ...] = ()
    by_row: bool = True
    counts: torch.Tensor | None = None


def cases(operator: str) -> Iterator[Case]:
    """The cases of an operator; KeyError if there is none of this name."""
    torch.manual_seed(SEED)
    yield from _CASES[operator]()


def _activations(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Rows of different magnitude."""
    return (torch.randn(*shape) * torch.exp2(torch.randint(-3, 4, (*shape[:-1], 1)))).to(dtype)


def _codes(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 100).clamp(-FP8_MAX, FP8_MAX).to(E4M3)


def _scale(*shape: int, dtype: torch.dtype, exponent: int = 0) -> torch.Tensor:
    """Around 2^exponent: bytes, or float32 that are no powers of two."""
    k = exponent + torch.randint(-3, 4, shape)
    return (k + 127).to(U8) if dtype == U8 else torch.ldexp(torch.rand(*shape) + 0.5, k)


def _weight(
    *shape: int, dtype: torch.dtype, gran: tuple[int, int] = GRAN, exponent: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [.., N, K] and their scales."""
    grid = (*shape[:-2], *grid_shape(shape[-2], shape[-1], gran))
    return _codes(*shape), _scale(*grid, dtype=dtype, exponent=exponent)


def _quantizer(width: int, tolerance: float) -> Iterator[Case]:
    """act_quant's options; width: columns of the input for each column of the codes."""
    few = FEW if tolerance else 1
    for (M, K), ue8m0, layout in product(((few, 400), (130, 300)), (True, False), SCALE_LAYOUTS):
        if ue8m0 or layout != "mn_major_packed":
            text = f"{M}x{K}, {'ue8m0' if ue8m0 else 'fp32'} scales, {layout}"
            options = {"ue8m0": ue8m0, "layout": layout}
            x = _activations(M, width * K)
            yield Case(text, (x,), options, tolerance, ("codes", "scales"))
    x, counts = _activations(3, 70, width * 300), torch.tensor([66, 0, 5])
    yield Case(
        "3 experts' rows, counted", (x,), {"ue8m0": True, "counts": counts}, tolerance,
        ("codes", "scales"), counts=counts,
    )  # fmt: skip
    x = _activations(5, width * 300, dtype=F32)
    yield Case("5x300 float32", (x,), {"ue8m0": True}, tolerance, ("codes", "scales"))


def _rms_norm_quant() -> Iterator[Case]:
    for (M, K), ue8m0, dtype in product(((FEW, 400), (70, 1300)), (True, False), (BF16, F32)):
        x, residual, weight = (_activations(*s, dtype=dtype) for s in ((M, K), (M, K), (K,)))
        text = f"{M}x{K} {dtype}, {'ue8m0' if ue8m0 else 'fp32'} scales"
        yield Case(
            text, (x, weight, 1e-6, residual), {"ue8m0": ue8m0}, INEXACT,
            ("codes", "scales", "sum with the residual"),
        )  # fmt: skip


def _add_rms_norm() -> Iterator[Case]:
    for (M, K), dtype, added in product(((FEW, 400), (70, 1300)), (BF16, F32), (True, False)):
        x, residual, weight = (_activations(*s, dtype=dtype) for s in ((M, K), (M, K), (K,)))
        names = ("norm", "sum with the residual") if added else ("norm",)
        arguments = (x, weight, 1e-6, residual if added else None)
        text = f"{M}x{K} {dtype}{', residual' if added else ''}"
        yield Case(text, arguments, {}, INEXACT, names)


def _weight_quant() -> Iterator[Case]:
    for (N, K), ue8m0 in product(((300, 400), (70, 90)), (True, False)):
        text = f"{N}x{K}, {'ue8m0' if ue8m0 else 'fp32'} scales"
        yield Case(text, (_activations(N, K, dtype=F32), ue8m0), names=("codes", "scales"))


def _weight_dequant() -> Iterator[Case]:
    for dtype, c, out in product((U8, F32), (None, 1.5), (BF16, F32)):
        w, sf = _weight(300, 400, dtype=dtype)
        factor = None if c is None else torch.rand(len(sf)) + c
        text = f"300x400, {dtype} scales{'' if c is None else ', c'}, {out}"
        yield Case(text, (w, sf, GRAN, factor, out), names=("weights",))


# Rows, dtype of the activations' and of the weight's scales, c and bias, granularity.
_PRODUCTS = (
    (1, U8, U8, False, GRAN),
    (5, U8, U8, True, GRAN),
    (33, F32, F32, False, GRAN),
    (65, U8, F32, True, GRAN),
    (300, U8, U8, True, GRAN),
    (9, F32, U8, False, (32, 64)),
)
N, K = 200, 400


def _gemm() -> Iterator[Case]:
    for M, a_dtype, w_dtype, extra, gran in _PRODUCTS:
        a, a_s = _codes(M, K), _scale(M, ceil_div(K, gran[1]), dtype=a_dtype)
        text = f"{M} rows, scales {a_dtype} and {w_dtype} of {gran[0]}x{gran[1]}"
        arguments = (a, a_s, *_weight_and_extra(w_dtype, extra, gran), gran, BF16)
        yield Case(text + ", c, bias" * extra, arguments, tolerance=PRODUCT_DIFF)


def _linear() -> Iterator[Case]:
    for M, a_dtype, w_dtype, extra, gran in _PRODUCTS:
        kind = "ue8m0" if a_dtype == U8 else "fp32"
        text = f"{M} rows, {kind} activations, scales {w_dtype} of {gran[0]}x{gran[1]}"
        arguments = (_activations(M, K), *_weight_and_extra(w_dtype, extra, gran), gran, kind)
        yield Case(text + ", c, bias" * extra, arguments, tolerance=PRODUCT_DIFF)
    for dtype, kind in ((BF16, "none"), (F32, "ue8m0")):
        x = _activations(17, K, dtype=dtype)
        arguments = (x, *_weight_and_extra(U8, True, GRAN), GRAN, kind)
        yield Case(f"17 rows {dtype}, activations {kind}", arguments, tolerance=PRODUCT_DIFF)


def _weight_and_extra(
    dtype: torch.dtype, extra: bool, gran: tuple[int, int]
) -> tuple[torch.Tensor | None, ...]:
    w, sf = _weight(N, K, dtype=dtype, gran=gran)
    return (w, sf, torch.rand(len(sf)) + 1, _activations(N)) if extra else (w, sf, None, None)


def _expert_weights(
    E: int, H: int, inner: int, dtype: torch.dtype, c: bool
) -> tuple[torch.Tensor | None, ...]:
    """w13, sf13, c13, w2, sf2, c2, such that hidden states and results are about 1."""
    w13, sf13 = _weight(E, 2 * inner, H, dtype=dtype, exponent=-11)
    w2, sf2 = _weight(E, H, inner, dtype=dtype, exponent=-11)
    c13, c2 = ((torch.rand(*sf.shape[:2]) + 1) if c else None for sf in (sf13, sf2))
    return w13, sf13, c13, w2, sf2, c2


# Sizes: tokens (of the batched format: rows that an expert has room for), experts of a token,
# experts, and the intermediate size. One token has many hidden values, because one of them that is
# next to a rounding boundary may get the neighboring code.
_EXPERTS = (
    (1, 8, 16, 512, "ue8m0", U8, False),
    (5, 4, 16, 256, "ue8m0", U8, True),
    (70, 4, 16, 256, "fp32", F32, False),
    (90, 4, 8, 256, "ue8m0", F32, True),
    (9, 2, 4, 192, "none", U8, False),
)
HIDDEN = 400


def _experts() -> Iterator[Case]:
    for M, topk, E, inner, kind, dtype, c in _EXPERTS:
        x, weights = torch.randn(M, HIDDEN).to(BF16), _expert_weights(E, HIDDEN, inner, dtype, c)
        ids = torch.rand(M, E).argsort(1)[:, :topk].to(torch.int32).contiguous()
        text = f"{M} tokens, {topk} of {E} experts of {inner}, {kind} activations, scales {dtype}"
        arguments = (x, *weights, torch.rand(M, topk), ids, GRAN, GRAN, kind, False)
        yield Case(text + ", c" * c, arguments, tolerance=EXPERTS_DIFF, by_row=False)


def _batched_experts() -> Iterator[Case]:
    for T, _, E, inner, kind, dtype, c in _EXPERTS:
        T, E = min(T, 70), min(E, 4)
        x, weights = torch.randn(E, T, HIDDEN).to(BF16), _expert_weights(E, HIDDEN, inner, dtype, c)
        counts = torch.tensor([T, 0, 1, max(T - 3, 1)], dtype=torch.int32)
        text = f"{E} experts of {inner}, up to {T} rows each, {kind} activations, scales {dtype}"
        arguments = (x, *weights, counts, GRAN, GRAN, kind)
        yield Case(text + ", c" * c, arguments, tolerance=EXPERTS_DIFF, by_row=False, counts=counts)


_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "act_quant": lambda: _quantizer(1, 0.0),
    "silu_mul_quant": lambda: _quantizer(2, INEXACT),
    "rms_norm_quant": _rms_norm_quant,
    "add_rms_norm": _add_rms_norm,
    "weight_quant": _weight_quant,
    "weight_dequant": _weight_dequant,
    "gemm": _gemm,
    "linear": _linear,
    "experts": _experts,
    "batched_experts": _batched_experts,
}
