"""The values of stored scales: which mean something, and what they are (2^k, c * 2^k, neither)."""

from __future__ import annotations

import torch

from ..codec import ScaleClass, exact_ue8m0, scale_to_float
from ..formats import BLOCK, FP8_MAX, FP8_NAN_CODE
from .shards import Checkpoint, CheckpointError
from .stats import read_used_blocks


def load_scale(
    source: Checkpoint, name: str, scale_name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales as float32, and a mask (None: all) of those that matter.

    A scale of 0, or code 0, does not matter over a block of zeros. Raises CheckpointError for
    any other 0 and for negative, infinite and NaN scales.
    """
    scale = scale_to_float(source.load(scale_name))
    bad = ~scale.isfinite() | (scale < 0)
    used = None
    tiny = scale < torch.finfo(torch.float32).tiny
    if bool(tiny.any()):
        used = read_used_blocks(source.tensors[name], (BLOCK, BLOCK), tiny) | ~tiny
        bad |= (scale == 0) & used
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise CheckpointError(
            f"{scale_name}: the scale of block [{row}, {column}] is {float(scale[row, column])} "
            f"({int(bad.sum())} such scales); a scale must be positive and finite. The weights of "
            "such a block are lost: fetch the checkpoint again."
        )
    return scale, used


def classify(source: Checkpoint, name: str, scale_name: str) -> tuple[ScaleClass, float]:
    """The class of a weight's scales and their c; raises CheckpointError for unusable ones."""
    exact = exact_ue8m0(*load_scale(source, name, scale_name))
    return exact.kind, exact.c


def check_bf16_range(source: Checkpoint, name: str, scale_name: str) -> None:
    """Raise CheckpointError for unusable scales, and for those with which bf16 overflows."""
    scale, _ = load_scale(source, name, scale_name)
    if bool((scale > torch.finfo(torch.bfloat16).max / FP8_MAX).any()):
        raise CheckpointError(
            f"{scale_name}: the largest scale is {float(scale.max()):g}; with it, weights "
            "overflow bf16. The source is damaged."
        )


def refuse_nan(name: str, codes: torch.Tensor) -> None:
    """Raise CheckpointError if there is a NaN among e4m3 codes."""
    if codes.numel() and int((codes.view(torch.uint8) & 0x7F).max()) == FP8_NAN_CODE:
        raise CheckpointError(f"{name} holds NaN codes: the source is damaged, fetch it again.")
