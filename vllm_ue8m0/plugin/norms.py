"""vLLM's RMSNorm, with or without the residual add, on this project's kernel.

A norm of vLLM or Inductor before a product keeps it from fetching its weights meanwhile. This one
lets it (programmatic dependent launch), and rounds in a compiled graph as it does outside of one.
"""

import torch
from torch import Tensor

from ..formats import BLOCK
from ..library import OPS
from . import compat

logger = compat.init_logger(f"vllm.{__name__}")
MAX_COLUMNS = 128 * BLOCK  # of a row, which a program holds in registers


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """x [M, K] -> [M, K]."""
    normed: Tensor = OPS.add_rms_norm(x, weight, epsilon)[0]
    return normed


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x, x_residual [M, K] -> norm of their sum, and the sum, [M, K] each."""
    normed, total = OPS.add_rms_norm(x, weight, epsilon, x_residual)
    return normed, total


def _takes_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes(x, weight, variance_size)


def _takes_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return x_residual.shape == x.shape and _takes(x, weight, variance_size)


def _takes(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    floats = (torch.bfloat16, torch.float32)
    return (
        x.dim() == 2
        and x.shape[1] <= MAX_COLUMNS
        and x.dtype in floats
        and weight is not None
        and weight.dtype in floats
        and variance_size is None
    )


NAME = "ue8m0"


def register() -> None:
    """Make them known to vLLM, for `--ir-op-priority` too; safe to call again.

    vLLM calls this for every model. So a release beyond the tested ones that takes them no longer
    keeps its own norms, with a warning.
    """
    try:
        compat.register_norm("rms_norm", NAME, rms_norm, _takes_norm)
        compat.register_norm("fused_add_rms_norm", NAME, fused_add_rms_norm, _takes_sum)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        logger.warning("ue8m0: norms stay vLLM's own, which takes no others: %s", error)


def prefer() -> None:
    """Put them before vLLM's own in the model that is being built, unless the user chose others."""
    for op in ("rms_norm", "fused_add_rms_norm"):
        if compat.has_norm(op, NAME):
            compat.prefer_norm(op, NAME)
