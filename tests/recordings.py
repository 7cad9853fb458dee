"""Recordings of made-up models: full-vocabulary logits in, their top k out."""

import numpy as np

from vllm_ue8m0.evaluate.recording import FORMAT, Recording

MACHINE = {"device": "CPU", "versions": {"vllm": "0.32.0"}, "date": "2026-11-23"}


def recording(logits, windows, k, texts=None, **meta):
    """logits: of each window [tokens - 1, V], what predicts its tokens from the second on."""
    rows = np.concatenate(logits).astype(np.float64)
    logp = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
    logp = (logp - rows.max(1, keepdims=True)).astype(np.float32)
    targets = np.concatenate([window[1:] for window in windows])
    top = np.argsort(-logp, axis=1, kind="stable")[:, :k].astype(np.int32)
    texts = [0] * len(windows) if texts is None else texts
    return Recording(
        {
            "format": FORMAT, "model": "made-up", "arguments": [], "quantization": None,
            "dtype": "bfloat16", **MACHINE, "top_k": k, "context": max(map(len, windows)),
            "vocabulary": "v", "files": [{"name": f"{i}.txt"} for i in range(max(texts) + 1)],
            **meta,
        },
        np.concatenate(windows).astype(np.int32),
        np.asarray([len(window) for window in windows], dtype=np.int32),
        np.asarray(texts, dtype=np.int32),
        np.take_along_axis(logp, targets[:, None], 1)[:, 0],
        top,
        np.take_along_axis(logp, top, 1),
    )  # fmt: skip


def full_kl(p, q):
    """KL of each row of logits over the whole vocabulary, in float64."""
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(1)


def made_up(seed, lengths=(40, 33, 7), V=300, noise=0.3, spread=2.0):
    """Windows of tokens, and the logits of a reference and of a noisy candidate."""
    random = np.random.default_rng(seed)
    windows = [random.integers(0, V, n) for n in lengths]
    reference = [random.normal(0, spread, (n - 1, V)) for n in lengths]
    candidate = [p + random.normal(0, noise, p.shape) for p in reference]
    return windows, reference, candidate
