"""An evaluation as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from ..columns import table
from .metrics import Score
from .recording import Recording

Texts = Sequence[tuple[str, Score]]


def text(candidate: Recording, reference: Recording | None, texts: Texts, total: Score) -> str:
    """The evaluation for people."""
    lines = []
    if reference is not None:
        lines.append(f"reference  {_side(reference)}")
    lines += [f"candidate  {_side(candidate)}", ""]
    rows = list(texts) if len(texts) == 1 else [*texts, ("all", total)]
    heading: tuple[str, ...] = ("text", "tokens", "perplexity")
    if reference is not None:
        heading = (*heading, "reference's", "KL >=", "+-", "99 %", "max", "top-1")
    aligned = "<" + ">" * (len(heading) - 1)
    lines += table([heading, *(_row(name, score) for name, score in rows)], aligned)
    return "\n".join([*lines, "", *_notes(candidate, reference, total)])


def to_json(
    candidate: Recording, reference: Recording | None, texts: Texts, total: Score
) -> dict[str, Any]:
    """The evaluation as `eval --json` prints it, one object; what is not finite is null."""
    return {
        "kl": "KL(reference || candidate) from below, nats per token",
        "total": _score(total),
        "texts": [{"text": name, **_score(score)} for name, score in texts],
        "candidate": candidate.meta,
        "reference": reference.meta if reference is not None else None,
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not isfinite(value) else value
        for key, value in asdict(score).items()
    }


def _side(recording: Recording) -> str:
    meta = recording.meta
    method = f"{meta['quantization']}, " if meta["quantization"] else ""
    where = f"vllm {meta['versions']['vllm']}, {meta['device']}, {meta['date']}"
    return f"{shlex.join([meta['model'], *meta['arguments']])} ({method}{meta['dtype']}; {where})"


def _row(name: str, score: Score) -> tuple[str, ...]:
    row = (name, f"{score.tokens:,}", f"{score.perplexity:.3f}")
    if score.kl is None or score.top1 is None:
        return row
    return (
        *row,
        f"{score.reference_perplexity:.3f}",
        f"{score.kl:.3g}",
        "-" if score.kl_error is None else f"{score.kl_error:.1g}",
        f"{score.kl_p99:.3g}",
        f"{score.kl_max:.3g}",
        f"{score.top1:.1%}",
    )


def _notes(candidate: Recording, reference: Recording | None, total: Score) -> Iterator[str]:
    yield (
        f"{total.windows} windows of up to {candidate.meta['context']} tokens, not overlapping; "
        "perplexity is per token."
    )
    if reference is None or total.covered is None:
        return
    yield (
        "KL(reference || candidate) is in nats per token, over the reference's "
        f"{reference.meta['top_k']} likeliest"
    )
    yield (
        "tokens and one cell for the rest: a lower bound of the KL over the vocabulary. "
        f"{total.covered:.1%}"
    )
    yield "of the reference's probability is on tokens compared one by one; a larger --top-k raises"
    yield "both. +-: standard error of the mean over windows."
