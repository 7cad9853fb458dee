"""KL divergence, top-1 agreement and perplexity of two recordings of the same tokens.

KL(reference || candidate) at a position is taken over a partition of the vocabulary, the same for
both: a cell for each token whose probability both recordings hold, one cell for the reference's
tokens that the candidate's list lacks, and one for all others. Merging tokens never increases KL
(the data-processing inequality), so it is a lower bound of the KL over the vocabulary.

The candidate's probability of the second cell is not recorded, only bounded: no token outside its
list is likelier than the last one in it, and together they have what its list leaves. Within that
bound the value that makes KL smallest is taken, so that the result stays a lower bound. So a
candidate that lists quite other tokens is not mistaken for a close one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import EvalError
from .recording import Recording, check_vocabulary

Floats = NDArray[np.float64]
# A sum of float32 probabilities is known to about this; what is left of 1 is not less certain.
RESOLUTION = 1e-6
_ROWS = 4096  # positions compared at a time: 100 MB for a list of 1,000 tokens


@dataclass(frozen=True)
class Score:
    """Means over the positions of a text. KL in nats per token, see the module's docstring.

    kl_error    standard error of the mean over windows, None for a single one
    kl_p99, kl_max    of single positions
    covered     probability that the reference gives to tokens in a cell of their own
    top1        share of positions with the same likeliest token, of equals the one with the least
                id, as greedy decoding takes it
    The fields about a reference are None without one.
    """

    tokens: int
    windows: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    covered: float | None = None
    top1: float | None = None


def score(
    candidate: Recording, reference: Recording | None
) -> tuple[list[tuple[str, Score]], Score]:
    """Name and score of each text, and the score of all.

    EvalError if the two did not see the same tokens.
    """
    kl = covered = same = None
    if reference is not None:
        check_same(candidate, reference)
        kl, covered = divergence(reference, candidate)
        same = _top1(reference) == _top1(candidate)
    windows = candidate.window_of_rows()

    def of(rows: NDArray[np.bool_]) -> Score:
        own = windows[rows]
        result = Score(len(own), len(np.unique(own)), _perplexity(candidate.actual[rows]))
        if reference is None or kl is None or covered is None or same is None:
            return result
        return Score(
            result.tokens,
            result.windows,
            result.perplexity,
            _perplexity(reference.actual[rows]),
            float(kl[rows].mean()),
            _error(kl[rows], own),
            float(np.percentile(kl[rows], 99)),
            float(kl[rows].max()),
            float(covered[rows].mean()),
            float(same[rows].mean()),
        )

    file_of_rows = candidate.files[windows]
    names = [file["name"] for file in candidate.meta["files"]]
    texts = [(name, of(file_of_rows == index)) for index, name in enumerate(names)]
    return texts, of(np.ones(len(windows), dtype=np.bool_))


def check_same(candidate: Recording, reference: Recording) -> None:
    """Raise EvalError unless both recordings are of one vocabulary, one text and one cutting."""
    check_vocabulary(candidate.meta["vocabulary"], candidate.meta["model"], reference)
    same = np.array_equal(candidate.lengths, reference.lengths)
    if not same or not np.array_equal(candidate.tokens, reference.tokens):
        raise EvalError(
            f"{candidate.meta['model']} and {reference.meta['model']} were recorded on different "
            "tokens: other texts, another --context, or another tokenization. Record one with the "
            "other as its --reference"
        )


def divergence(reference: Recording, candidate: Recording) -> tuple[Floats, Floats]:
    """Of each position: KL(reference || candidate) from below, and `covered` of Score; [R] each."""
    targets = reference.targets()
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(_divergence(reference, candidate, targets[rows], rows))
    kl, covered = zip(*parts, strict=True)
    return np.concatenate(kl), np.concatenate(covered)


def _divergence(
    reference: Recording, candidate: Recording, targets: NDArray[np.int32], rows: slice
) -> tuple[Floats, Floats]:
    """p is the reference's, q the candidate's; _list, _actual: the k likeliest, the text's own."""
    p_log, p_ids = reference.top_logprobs[rows].astype(np.float64), reference.top_ids[rows]
    q_log, q_ids = candidate.top_logprobs[rows].astype(np.float64), candidate.top_ids[rows]
    p_actual, q_actual = (side.actual[rows].astype(np.float64) for side in (reference, candidate))
    at_actual = p_ids == targets[:, None]
    q_at = np.where(at_actual, q_actual[:, None], _look_up(p_ids, q_ids, q_log))  # NaN: lacking
    known = ~np.isnan(q_at)
    apart = ~at_actual.any(1)  # the text's token is not in the reference's list: one cell more

    p = np.exp(p_log)
    cells = np.where(known & (p > 0), p * (p_log - np.where(known, q_at, 0)), 0).sum(1)
    cells += np.where(apart, np.exp(p_actual) * (p_actual - q_actual), 0)
    p_known = np.where(known, p, 0).sum(1) + np.where(apart, np.exp(p_actual), 0)
    q_known = np.where(known, np.exp(q_at), 0).sum(1) + np.where(apart, np.exp(q_actual), 0)

    p_lacking = np.where(known, 0, p).sum(1)
    p_rest = np.maximum(1 - p_known - p_lacking, 0)
    q_left = np.maximum(1 - q_known, RESOLUTION)
    listed = np.exp(q_log).sum(1)
    listed += np.where((q_ids == targets[:, None]).any(1), 0, np.exp(q_actual))
    most = np.minimum((~known).sum(1) * np.exp(q_log.min(1)), 1 - listed)
    p_left = p_lacking + p_rest
    share = np.divide(p_lacking, p_left, out=np.zeros_like(p_left), where=p_left > 0)
    q_lacking = np.minimum(q_left * share, np.maximum(most, RESOLUTION))
    cells += _term(p_lacking, q_lacking) + _term(p_rest, q_left - q_lacking)
    return np.maximum(cells, 0), p_known


def _look_up(ids: NDArray[np.int32], list_ids: NDArray[np.int32], list_logprobs: Floats) -> Floats:
    """Of each id [R, k] its log-probability in the same row of a list [R, j]; NaN if absent."""
    stride = int(max(ids.max(), list_ids.max())) + 1
    first = np.arange(len(ids), dtype=np.int64)[:, None] * stride
    wanted, keys = (first + ids).ravel(), (first + list_ids).ravel()
    order = np.argsort(keys)
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    found = np.where(keys[at] == wanted, list_logprobs.ravel()[at], np.nan)
    result: Floats = found.reshape(ids.shape)
    return result


def _term(p: Floats, q: Floats) -> Floats:
    """p log(p / q), 0 where p is."""
    ratio = np.divide(p, np.maximum(q, RESOLUTION), out=np.ones_like(p), where=p > 0)
    term: Floats = p * np.log(ratio)
    return term


def _top1(recording: Recording) -> NDArray[np.int32]:
    best = recording.top_logprobs == recording.top_logprobs.max(1, keepdims=True)
    limit = np.iinfo(np.int32).max
    ids: NDArray[np.int32] = np.where(best, recording.top_ids, limit).min(1)
    return ids


def _perplexity(logprobs: NDArray[np.float32]) -> float:
    return float(np.exp(-logprobs.astype(np.float64).mean()))


def _error(values: Floats, windows: NDArray[np.int64]) -> float | None:
    """Standard error of the mean of values that are independent between windows, not within."""
    _, index = np.unique(windows, return_inverse=True)
    sums = np.bincount(index, values - values.mean())
    if len(sums) < 2:
        return None
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
