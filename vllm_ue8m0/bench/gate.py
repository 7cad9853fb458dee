"""The correctness gate: a sample of our result against `reference`, and of a peer's against ours.

What may differ from the reference is in agreement.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..agreement import PRODUCT_DIFF, bits, differs, form, rows_differ
from .case import Inputs, Operator, Outputs

ROWS = 64
WEIGHT_SLICE = (256, 512)
# What a peer may differ in and still do the same work: vLLM's fused kernels round SiLU times up
# and the norm's result in other places. Wrong arguments or outputs differ in most codes.
SAME_WORK = 0.1
# Between two products of the same operands, and where activations are quantized with other scales:
# e4m3 rounds to about 3.7e-2 of a product's norm, so two such roundings lie about 1.4e-3 apart. Of
# the experts' peers one that does not round silu(gate) * up to bf16 is up to 1e-3 away, one with
# float32 activation scales 5e-3 (emulated).
SAME_PRODUCT, SAME_VALUES = 1e-4, 1e-2


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
        wrong = differs(name, want, got, tolerance)
        if wrong:
            return wrong
    return None


def agree(sample: Sample, ours: Outputs, theirs: Outputs) -> str | None:
    """Why a peer's codes cannot come from the same work, or None."""
    want, got = (sample.outputs(outputs[:1])[0] for outputs in (ours, theirs))
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"codes are {form(got)}, ours {form(want)}"
    share = float((bits(want) != bits(got)).float().mean())
    return f"{share:.0%} of its codes differ from ours" if share > SAME_WORK else None


def check_product(
    reference: Operator,
    sample: Sample,
    inputs: Inputs,
    outputs: Outputs,
    tolerance: float | torch.Tensor = PRODUCT_DIFF,
) -> str | None:
    """What is wrong with our product [M, N] bf16, or None; a dense reference's is not rounded."""
    return _differs(reference(sample.inputs(inputs))[0], outputs, sample, tolerance)


def agree_product(sample: Sample, tolerance: float, ours: Outputs, theirs: Outputs) -> str | None:
    """Why a peer's product cannot be that of the same operands, or None."""
    return _differs(sample.outputs(ours)[0], theirs, sample, tolerance)


def _differs(
    want: torch.Tensor, outputs: Outputs, sample: Sample, tolerance: float | torch.Tensor
) -> str | None:
    got = sample.outputs(outputs)[0]
    if got.shape != want.shape or got.dtype != torch.bfloat16:
        return f"the product is {form(got)} instead of torch.bfloat16 {tuple(want.shape)}"
    return rows_differ(want, got, tolerance)


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
