"""What the tiny model is measured by: perplexity, expert usage, MTP agreement, KL of variants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import BOS, encode
from .model import TinyDeepseek

WINDOW = 1023  # bytes scored at a time, after a <bos>: max_position_embeddings tokens


@dataclass
class Report:
    perplexity: float  # per byte
    mtp_perplexity: float
    mtp_agreement: float  # its argmax for token t + 2 is the main model's
    expert_share: list[list[float]]  # [MoE layer, expert], the MTP layer last; rows sum to 1
    num_bytes: int


def windows(text: bytes) -> Tensor:
    """[n, 1 + WINDOW] tokens; what does not fill a window is left out."""
    tokens = encode(text)
    tokens = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return torch.cat((torch.full((len(tokens), 1), BOS), tokens), 1)


@torch.no_grad()
def evaluate(model: TinyDeepseek, tokens: Tensor, batch: int = 4) -> Report:
    nll = mtp_nll = agreed = counts = 0
    for part in tokens.split(batch):
        logits, mtp_logits = model(part, mtp=True)
        logits, mtp_logits = logits[:, :-1], mtp_logits[:, :-2]
        nll += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        mtp_nll += F.cross_entropy(mtp_logits.flatten(0, 1), part[:, 2:].flatten(), reduction="sum")
        agreed += (mtp_logits.argmax(-1) == logits[:, 1:].argmax(-1)).sum()
        counts += model.expert_counts()
    n = tokens[:, 1:].numel()
    n_mtp = n - len(tokens)
    share = counts / counts.sum(1, keepdim=True)
    return Report(
        math.exp(nll / n), math.exp(mtp_nll / n_mtp), float(agreed / n_mtp), share.tolist(), n
    )


@torch.no_grad()
def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row of logits, [..., V] -> [...]."""
    p, q = (x.double().log_softmax(-1) for x in (reference, other))
    return (p.exp() * (p - q)).sum(-1)


def loss_plot(records: list[dict], baseline: float) -> str:
    """The loss curve as SVG: nats per byte over steps, logarithmic in steps; baseline dashed."""
    width, height, left, top = 640, 320, 48, 12
    steps = [r["step"] for r in records]
    low, high = 0.0, 4.0
    first, last = math.log(max(steps[0], 1)), math.log(steps[-1])

    def x(step: float) -> float:
        return left + (math.log(max(step, 1)) - first) / (last - first) * (width - left - 12)

    def y(loss: float) -> float:
        return top + (high - min(loss, high)) / (high - low) * (height - top - 36)

    def line(key: str, color: str) -> str:
        points = " ".join(f"{x(r['step']):.1f},{y(r[key]):.1f}" for r in records if key in r)
        return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#555">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for tick in range(int(low), int(high) + 1):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{width - 12}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for power in range(1, 6):
        if steps[0] <= 10**power <= steps[-1]:
            parts.append(
                f'<text x="{x(10**power):.1f}" y="{height - 20}" text-anchor="middle">'
                f"{10**power}</text>"
            )
    parts += [
        f'<path d="M{left} {y(baseline):.1f}H{width - 12}" stroke="#888" stroke-dasharray="5 4"/>',
        f'<text x="{left + 6}" y="{y(baseline) - 5:.1f}">3-gram model, held-out</text>',
        line("mtp_loss", "#d55e00"), line("loss", "#0072b2"), line("heldout_loss", "#009e73"),
    ]  # fmt: skip
    for i, (text, color) in enumerate(
        (("MTP loss", "#d55e00"), ("training loss", "#0072b2"), ("held-out loss", "#009e73"))
    ):
        parts.append(
            f'<text x="{width - 110}" y="{top + 18 + 16 * i}" fill="{color}">{text}</text>'
        )
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 5}" text-anchor="middle">'
        "step (nats per byte)</text></svg>"
    )
    return "\n".join(parts) + "\n"
