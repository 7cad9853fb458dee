"""When a result is the reference's: what benchmarks ask before they time, and `doctor` of a GPU.

Quantizers agree bit for bit. Where the arithmetic before rounding is not exact (exp, a sum over a
row), a share `tolerance` of the codes may differ, and as large a share of the scales plus one; a
float32 scale differs if it is off by more than 2^-16 of itself. A residual or a dequantized weight
is exact always.

Rows of a product are held against the float32 product of the dequantized operands by calc_diff, as
DeepGEMM does: 1.5e-6 is bf16's rounding, one wrong value in a row of 36,864 about 1.4e-5. Routed
experts quantize what their first product gives: a sum that rounds to the other bf16 value flips an
e4m3 code now and then. With accumulators of 14 bits that makes 2e-5 in the worst row (emulated).
"""

from __future__ import annotations

import torch

INEXACT = 0.005  # tolerance of what rounds an exp or a sum
_SCALE_ULPS = 2.0**-16
PRODUCT_DIFF = 5e-6
# Of routed experts: the tensor cores' sums of 14 bits turn some codes of the hidden state to their
# neighbours, up to 1.1e-4 in one of 64 rows (H100, 2026-11-23).
EXPERTS_DIFF = 3e-4
# A single code, if it has much of the row's norm, is up to 2.1e-3 of a row that is the sum of 2,048
# (8 experts of 256, 1,500 rows) and 4.2e-4 of one of 16,384: computed from the operands of
# `bench moe`. On an H100 one row of 16 was 3.6e-4 away with 2,048 (2026-11-24).
_ONE_CODE = 7.0


def differs(name: str, want: torch.Tensor, got: torch.Tensor, tolerance: float) -> str | None:
    """What is wrong with a quantizer's result, `name` "codes", "scales" or another, or None."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{name} are {form(got)} instead of {form(want)}"
    exact = tolerance == 0 or name not in ("codes", "scales", "norm")
    if want.dtype == torch.float32 and not exact:
        different = ~((want - got).abs() <= want.abs() * _SCALE_ULPS)  # NaN differs
    else:
        want, got = bits(want), bits(got)
        different = want != got
    wrong, total = int(different.sum()), different.numel()
    allowed = 0 if exact else int(tolerance * total) + (name == "scales")
    if wrong <= allowed:
        return None
    where = tuple(int(i) for i in different.nonzero()[0])
    return (
        f"{wrong} of {total} {name} differ from the reference (allowed: {allowed}), first "
        f"{got[where].item()} instead of {want[where].item()} at {where}"
    )


def experts_diff(topk_ids: torch.Tensor, intermediate: int) -> torch.Tensor:
    """Allowed in each row of routed experts: less, the more codes it is the sum of. float64 [M].

    topk_ids [M, topk]: local ones, -1: not here. intermediate: an expert's width.
    """
    codes = (topk_ids >= 0).sum(-1).clamp(min=1) * intermediate
    return (_ONE_CODE / codes.to(torch.float64)).clamp(min=EXPERTS_DIFF)


def rows_differ(
    want: torch.Tensor, got: torch.Tensor, tolerance: float | torch.Tensor
) -> str | None:
    """What is wrong with the rows of a product [M, N], or None. tolerance: of all, or each [M]."""
    diff = calc_diff(want, got).nan_to_num(torch.inf)
    allowed = torch.as_tensor(tolerance, dtype=diff.dtype, device=diff.device).expand_as(diff)
    wrong = int((diff > allowed).sum())
    if wrong == 0:
        return None
    worst = int((diff / allowed).argmax())
    return (
        f"{wrong} of {diff.numel()} rows differ, calc_diff up to {float(diff[worst]):.1e} "
        f"(allowed: {float(allowed[worst]):.0e})"
    )


def calc_diff(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """1 - 2 <x, y> / (<x, x> + <y, y>) of every row of [M, N], 0 if both are 0; float64 [M]."""
    x, y = want.to(torch.float64), got.to(torch.float64)
    squares = (x * x + y * y).sum(-1)
    return torch.where(squares == 0, 0, 1 - 2 * (x * y).sum(-1) / squares)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """An integer per element, or per byte of packed scales."""
    if tensor.dtype == torch.int32:
        # Not contiguous(): it keeps any stride of a last dimension of one.
        return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
