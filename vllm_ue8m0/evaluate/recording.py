"""What a model predicted for given tokens: an .npz file, read without vLLM and torch.

W windows, T tokens in all, R = T - W predictions: none for the first token of a window.

  meta          JSON: format, model, arguments, quantization, dtype, device, versions, date, top_k,
                context, vocabulary (a digest), files [{"name", "sha256"}]
  tokens        int32 [T], the windows one after another
  lengths       int32 [W], tokens of each window;  files  int32 [W], its text, in meta's order
  actual        float32 [R], log-probability (natural) of the token that the text has
  top_ids       int32 [R, k], the k likeliest tokens;  top_logprobs  float32 [R, k]
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import EvalError

FORMAT = 1
_ARRAYS = {
    "tokens": (np.int32, 1),
    "lengths": (np.int32, 1),
    "files": (np.int32, 1),
    "actual": (np.float32, 1),
    "top_ids": (np.int32, 2),
    "top_logprobs": (np.float32, 2),
}
HOW = "`vllm-ue8m0 eval MODEL --text FILE --out RECORDING.npz` writes one"


@dataclass(frozen=True)
class Recording:
    """See the module's docstring."""

    meta: dict[str, Any]
    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    files: NDArray[np.int32]
    actual: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    @property
    def starts(self) -> NDArray[np.int64]:
        """The index of each window's first token, [W]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def windows(self) -> list[list[int]]:
        """The token ids of each window."""
        return [part.tolist() for part in np.split(self.tokens, self.starts[1:])]

    def targets(self) -> NDArray[np.int32]:
        """The tokens that were predicted, [R]: all but the first of each window."""
        return np.delete(self.tokens, self.starts)

    def window_of_rows(self) -> NDArray[np.int64]:
        """The window of each prediction, [R]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths - 1)


def write(path: Path, recording: Recording) -> None:
    """Write a file that is whole or absent."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        arrays = {name: getattr(recording, name) for name in _ARRAYS}
        np.savez(file, meta=np.array(json.dumps(recording.meta)), **arrays)
    partial.replace(path)


def read(path: str | Path) -> Recording:
    """Read a file; EvalError if it is not a whole recording, OSError passes through."""
    if Path(path).is_dir():
        raise EvalError(f"{path}: a directory, not a recording; {HOW}")
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {name: file[name] for name in _ARRAYS}
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise EvalError(f"{path}: not a recording ({error}); {HOW}") from error
    if meta.get("format") != FORMAT:
        raise EvalError(
            f"{path}: format {meta.get('format')!r}; this version reads {FORMAT}. Record it again"
        )
    wrong = [
        name
        for name, (dtype, dims) in _ARRAYS.items()
        if arrays[name].dtype != dtype or arrays[name].ndim != dims
    ]
    recording = Recording(meta, **arrays)
    if wrong or not _consistent(recording):
        found = ", ".join(wrong) or "sizes disagree"
        raise EvalError(f"{path}: damaged ({found}); record it again")
    return recording


def _consistent(recording: Recording) -> bool:
    rows, texts = len(recording.tokens) - len(recording.lengths), len(recording.meta["files"])
    return (
        len(recording.lengths) == len(recording.files) > 0
        and int(recording.lengths.min()) > 1
        and int(recording.lengths.sum()) == len(recording.tokens)
        and len(recording.actual) == len(recording.top_ids) == rows
        and recording.top_ids.shape == recording.top_logprobs.shape
        and 0 <= int(recording.files.min()) <= int(recording.files.max()) < texts
    )


def check_vocabulary(vocabulary: str, model: str, reference: Recording) -> None:
    """Raise EvalError unless this digest of a model's vocabulary is the reference's."""
    if vocabulary != reference.meta["vocabulary"]:
        raise EvalError(
            f"the tokenizers of {model} and {reference.meta['model']} have different vocabularies: "
            "their probabilities are not of the same tokens. Compare models of one tokenizer "
            "(vLLM's --tokenizer names another directory)"
        )
