"""The correctness gate: a sample of our result against `reference`; of quantizers, bit for bit.

Where the arithmetic before rounding is not exact (exp, a sum over a row), a share `tolerance` of
the codes may differ, and as large a share of the scales plus one; a float32 scale differs if it is
off by more than 2^-16 of itself. A residual or a dequantized weight is exact always.

Rows of a product are held against the float32 product of the dequantized operands by calc_diff, as
DeepGEMM does: 1.5e-6 is bf16's rounding, one wrong value in a row of 36,864 about 1.4e-5. Routed
experts quantize what their first product gives: a sum that rounds to the other bf16 value flips an
e4m3 code now and then. With accumulators of 14 bits that makes 2e-5 in the worst row (emulated).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .case import Inputs, Operator, Outputs

ROWS = 64
WEIGHT_SLICE = (256, 512)
INEXACT = 0.005  # tolerance of what rounds an exp or a sum
# What a peer may differ in and still do the same work: vLLM's fused kernels round SiLU times up
# and the norm's result in other places. Wrong arguments or outputs differ in most codes.
SAME_WORK = 0.1
_SCALE_ULPS = 2.0**-16
PRODUCT_DIFF = 5e-6
# Between two products of the same operands, and where activations are quantized with other scales:
# e4m3 rounds to about 3.7e-2 of a product's norm, so two such roundings lie about 1.4e-3 apart.
SAME_PRODUCT, SAME_VALUES = 1e-4, 1e-2
# Of routed experts: the tensor cores' sums of 14 bits turn some codes of the hidden state to their
# neighbours, up to 1.1e-4 in one of 64 rows (H100, 2026-11-23). Of their peers one that does not
# round silu(gate) * up to bf16 is up to 1e-3 away, one with float32 activation scales 5e-3
# (emulated): SAME_VALUES is for both.
EXPERTS_DIFF = 3e-4


@dataclass(frozen=True)
class Sample:
    """Which part of the inputs goes to the reference, and the part of the outputs it answers to.

    results names the outputs; the first are the codes.
    """

    inputs: Callable[[Inputs], Inputs]
    outputs: Callable[[Outputs], Outputs]
    results: tuple[str, ...] = ("codes", "scales")


def check(
    reference: Operator, sample: Sample, tolerance: float, inputs: Inputs, outputs: Outputs
) -> str | None:
    """What is wrong with our outputs, or None."""
    expected = reference(sample.inputs(inputs))
    if len(outputs) != len(expected):
        return f"{len(outputs)} results instead of {len(expected)}"
    for name, want, got in zip(sample.results, expected, sample.outputs(outputs), strict=True):
        wrong = _compare(name, want, got, tolerance)
        if wrong:
            return wrong
    return None


def agree(sample: Sample, ours: Outputs, theirs: Outputs) -> str | None:
    """Why a peer's codes cannot come from the same work, or None."""
    want, got = (sample.outputs(outputs[:1])[0] for outputs in (ours, theirs))
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"codes are {_form(got)}, ours {_form(want)}"
    share = float((_bits(want) != _bits(got)).float().mean())
    return f"{share:.0%} of its codes differ from ours" if share > SAME_WORK else None


def check_product(
    reference: Operator,
    sample: Sample,
    inputs: Inputs,
    outputs: Outputs,
    tolerance: float = PRODUCT_DIFF,
) -> str | None:
    """What is wrong with our product [M, N] bf16, or None; a dense reference's is not rounded."""
    return _differs(reference(sample.inputs(inputs))[0], outputs, sample, tolerance)


def agree_product(sample: Sample, tolerance: float, ours: Outputs, theirs: Outputs) -> str | None:
    """Why a peer's product cannot be that of the same operands, or None."""
    return _differs(sample.outputs(ours)[0], theirs, sample, tolerance)


def calc_diff(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """1 - 2 <x, y> / (<x, x> + <y, y>) of every row of [M, N], 0 if both are 0; float64 [M]."""
    x, y = want.to(torch.float64), got.to(torch.float64)
    squares = (x * x + y * y).sum(-1)
    return torch.where(squares == 0, 0, 1 - 2 * (x * y).sum(-1) / squares)


def _differs(want: torch.Tensor, outputs: Outputs, sample: Sample, tolerance: float) -> str | None:
    got = sample.outputs(outputs)[0]
    if got.shape != want.shape or got.dtype != torch.bfloat16:
        return f"the product is {_form(got)} instead of torch.bfloat16 {tuple(want.shape)}"
    diff = calc_diff(want, got)
    wrong = int((~(diff <= tolerance)).sum())  # NaN is
    if wrong == 0:
        return None
    worst = float(diff.nan_to_num(torch.inf).max())
    return (
        f"{wrong} of {diff.numel()} sampled rows differ, calc_diff up to {worst:.1e} "
        f"(allowed: {tolerance:.0e})"
    )


def _compare(name: str, want: torch.Tensor, got: torch.Tensor, tolerance: float) -> str | None:
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{name} are {_form(got)} instead of {_form(want)}"
    exact = tolerance == 0 or name not in ("codes", "scales")
    if want.dtype == torch.float32 and not exact:
        different = ~((want - got).abs() <= want.abs() * _SCALE_ULPS)  # NaN differs
    else:
        want, got = _bits(want), _bits(got)
        different = want != got
    wrong, total = int(different.sum()), different.numel()
    allowed = 0 if exact else int(tolerance * total) + (name == "scales")
    if wrong <= allowed:
        return None
    where = tuple(int(i) for i in different.nonzero()[0])
    return (
        f"{wrong} of {total} sampled {name} differ from the reference (allowed: {allowed}), first "
        f"{got[where].item()} instead of {want[where].item()} at {where}"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """An integer per element, or per byte of packed scales."""
    if tensor.dtype == torch.int32:
        # Not contiguous(): it keeps any stride of a last dimension of one.
        return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def rows_of(total: int) -> torch.Tensor:
    """Up to ROWS row numbers below `total`, the first and the last among them."""
    return torch.linspace(0, total - 1, min(total, ROWS), dtype=torch.float64).long()


def sample_rows(
    index: tuple[torch.Tensor, ...],
    by_row: tuple[str, ...],
    results: tuple[str, ...] = ("codes", "scales"),
    drop: tuple[str, ...] = (),
) -> Sample:
    """Rows picked by `index` from the leading dimensions of the inputs `by_row` and the outputs."""

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.element_size() > 1:
            return tensor[index]
        return tensor.view(torch.uint8)[index].view(tensor.dtype)  # e4m3 cannot be indexed

    def pick_inputs(inputs: Inputs) -> Inputs:
        kept = {name: tensor for name, tensor in inputs.items() if name not in drop}
        return {name: pick(t) if name in by_row else t for name, t in kept.items()}

    return Sample(pick_inputs, lambda outputs: [pick(t) for t in outputs], results)


def sample_blocks(N: int, K: int, results: tuple[str, ...] = ("codes", "scales")) -> Sample:
    """The last WEIGHT_SLICE of a weight and its 128x128 scales; N, K multiples of 128."""

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        block = 1 if tensor.shape == (N, K) else 128
        rows, columns = (
            min(size, full) // block for size, full in zip(WEIGHT_SLICE, (N, K), strict=True)
        )
        return tensor[-rows:, -columns:].contiguous()

    def pick_inputs(inputs: Inputs) -> Inputs:
        return {name: pick(tensor) for name, tensor in inputs.items()}

    return Sample(pick_inputs, lambda outputs: [pick(t) for t in outputs], results)
