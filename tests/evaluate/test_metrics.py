"""KL from top-k lists against the KL over the vocabulary, and everything else by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import full_kl, made_up, recording

from vllm_ue8m0.evaluate import EvalError, metrics


def exact(reference, candidate, k):
    """KL over the reference's k likeliest tokens and one cell, the candidate's all known."""
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (reference, candidate))
    top = np.argsort(-p, axis=1)[:, :k]
    p, q = (np.take_along_axis(x, top, 1) for x in (p, q))
    p, q = (np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1) for x in (p, q))
    return (p * np.log(p / q)).sum(1)


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 300),
    noise=st.sampled_from([0.01, 0.3, 3.0, 10.0]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
)
@settings(deadline=None, max_examples=60)
def test_a_lower_bound_at_every_position(seed, k, noise, spread):
    windows, p, q = made_up(seed, (9, 2), 300, noise, spread)
    kl, covered = metrics.divergence(recording(p, windows, k), recording(q, windows, k))
    full = full_kl(np.concatenate(p), np.concatenate(q))
    assert (kl >= 0).all() and (kl <= full * (1 + 1e-5) + 1e-5).all()
    assert (covered <= 1 + 1e-5).all()


def test_all_tokens_give_the_full_kl():
    windows, p, q = made_up(1)
    kl, covered = metrics.divergence(recording(p, windows, 300), recording(q, windows, 300))
    np.testing.assert_allclose(kl, full_kl(np.concatenate(p), np.concatenate(q)), rtol=1e-4)
    np.testing.assert_allclose(covered, 1, rtol=1e-5)


def test_a_list_that_lacks_nothing_gives_the_kl_of_its_partition():
    """The candidate recorded with all tokens; of the reference only ten."""
    windows, p, q = made_up(2)
    text = [np.full(len(window), p_[0].argmax()) for window, p_ in zip(windows, p, strict=True)]
    for rows, window in zip(p, text, strict=True):  # the text's token is among the ten
        rows[:, window[0]] += 20
    kl, _ = metrics.divergence(recording(p, text, 10), recording(q, text, 300))
    expected = exact(np.concatenate(p), np.concatenate(q), 10)
    np.testing.assert_allclose(kl, expected, rtol=1e-4, atol=1e-6)


def test_longer_lists_come_closer():
    windows, p, q = made_up(3, noise=0.5)
    full = full_kl(np.concatenate(p), np.concatenate(q)).mean()
    means = [
        metrics.divergence(recording(p, windows, k), recording(q, windows, k))[0].mean()
        for k in (5, 20, 80, 240)
    ]
    assert means == sorted(means) and 0.9 * full < means[-1] <= full and means[0] < 0.5 * full


def test_quite_other_tokens_are_not_close():
    """Nothing of one list is in the other; one cell for all of it would say 0."""
    V, k = 200, 10
    p, q = np.zeros((30, V)), np.zeros((30, V))
    p[:, :k], q[:, -k:] = 12, 12
    windows = [np.full(31, 100)]
    kl, covered = metrics.divergence(recording([p], windows, k), recording([q], windows, k))
    assert (kl > 5).all() and (kl <= full_kl(p, q)).all()
    assert (covered < 1e-3).all()


def test_lacking_tokens_by_hand():
    """p: .6 .3 .1 of tokens 0, 1, 2; q: .9 .08 .02 of tokens 2, 0, 1; lists of two, text 2."""
    p, q = np.log([[0.6, 0.3, 0.1]]), np.log([[0.08, 0.02, 0.9]])
    kl, covered = metrics.divergence(recording([p], [[0, 2]], 2), recording([q], [[0, 2]], 2))
    # q's list is 2 and 0; it lacks 1, which has at most the 0.02 that are left. Nothing is beside.
    expected = 0.6 * np.log(0.6 / 0.08) + 0.1 * np.log(0.1 / 0.9) + 0.3 * np.log(0.3 / 0.02)
    np.testing.assert_allclose(kl, [expected], rtol=1e-5)
    np.testing.assert_allclose(covered, [0.7], rtol=1e-5)


def test_a_model_and_itself():
    windows, p, _ = made_up(4)
    own = recording(p, windows, 20)
    texts, total = metrics.score(own, own)
    assert (total.kl, total.kl_max, total.kl_error, total.top1) == (0, 0, 0, 1)
    assert total.perplexity == total.reference_perplexity
    assert [name for name, _ in texts] == ["0.txt"]


def test_scores_of_each_text_and_of_all():
    windows, p, q = made_up(5, (10, 20, 31))
    files = [0, 1, 1]
    reference, candidate = recording(p, windows, 30, files), recording(q, windows, 30, files)
    texts, total = metrics.score(candidate, reference)
    kl, covered = metrics.divergence(reference, candidate)
    (_, first), (_, second) = texts
    assert (first.tokens, first.windows, second.tokens, second.windows) == (9, 1, 49, 2)
    assert (total.tokens, total.windows) == (58, 3)
    assert first.kl == pytest.approx(kl[:9].mean()) and second.kl_max == kl[9:].max()
    assert total.kl == pytest.approx(kl.mean()) and total.covered == pytest.approx(covered.mean())
    assert total.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert first.kl_error is None  # one window
    sums = np.array([(kl[9:28] - second.kl).sum(), (kl[28:] - second.kl).sum()])
    assert second.kl_error == pytest.approx(np.sqrt((sums**2).sum() * 2 / 1) / 49)
    assert total.perplexity == pytest.approx(np.exp(-candidate.actual.mean()), rel=1e-5)
    assert first.reference_perplexity == pytest.approx(np.exp(-reference.actual[:9].mean()))


def test_without_a_reference():
    windows, p, _ = made_up(6)
    _, total = metrics.score(recording(p, windows, 5), None)
    assert total.perplexity > 1 and total.kl is None and total.top1 is None


def test_top1_takes_the_least_id_of_equals():
    windows = [np.zeros(4, dtype=int)]
    p = np.array([[5.0, 5, 0, 0], [5, 5, 0, 0], [0, 5, 5, 0]])
    q = np.array([[5.0, 5, 5, 0], [0, 5, 0, 0], [0, 5, 0, 0]])
    reference, candidate = recording([p], windows, 3), recording([q], windows, 3)
    candidate.top_ids[0], candidate.top_logprobs[0] = [2, 1, 0], candidate.top_logprobs[0, 0]
    assert metrics.score(candidate, reference)[1].top1 == pytest.approx(2 / 3)


def test_other_tokens_are_refused():
    windows, p, q = made_up(7)
    reference, candidate = recording(p, windows, 5), recording(q, windows, 5)
    other = replace(candidate, meta={**candidate.meta, "vocabulary": "w"})
    with pytest.raises(EvalError, match="different vocabularies"):
        metrics.score(other, reference)
    tokens = candidate.tokens.copy()
    tokens[3] += 1
    with pytest.raises(EvalError, match="different tokens: other texts"):
        metrics.score(replace(candidate, tokens=tokens), reference)
    lengths = candidate.lengths[::-1].copy()
    with pytest.raises(EvalError, match="another --context"):
        metrics.score(replace(candidate, lengths=lengths), reference)


def test_many_rows_are_compared_in_parts(monkeypatch):
    windows, p, q = made_up(8)
    reference, candidate = recording(p, windows, 20), recording(q, windows, 20)
    whole = metrics.divergence(reference, candidate)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    parts = metrics.divergence(reference, candidate)
    np.testing.assert_array_equal(whole, parts)
