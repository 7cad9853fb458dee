"""Serve a model with vLLM and record what it predicts: `python -m ... JOB.json`, for command.py.

A program of its own, so that the model's memory ends with it, and because vLLM logs to stdout and
its CPU build may abort at exit, when the work is done. JOB.json:

  {"model", "arguments": [vLLM's engine options], "out": recording to write,
   "texts": [[name, text]], "context": tokens of a window or null, "top_k",
    or instead of these three "reference": a recording whose tokens are taken,
   "error": file to write the text of an EvalError to}

The only module here that imports vLLM.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..versions import versions
from . import CONTEXT, EvalError
from .recording import FORMAT, Recording, check_vocabulary, read, write

# Log-probabilities asked for at once: vLLM returns them in lists of Python objects, about 100 bytes
# for each, so 800 MB; 80 windows of 1,024 tokens at top 100.
BATCH_ENTRIES = 1 << 23


def main(job_file: str) -> int:
    """Do the job; returns the exit status."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        write(Path(job["out"]), record(job))
    except EvalError as error:
        Path(job["error"]).write_text(str(error), encoding="utf-8")
        return 1
    return 0


def record(job: dict[str, Any]) -> Recording:
    """Serve job's model and collect its predictions."""
    from vllm import LLM
    from vllm.tokenizers import cached_tokenizer_from_config

    reference = read(job["reference"]) if job.get("reference") else None
    engine = engine_args(job["model"], job["arguments"])
    try:
        config = engine.create_model_config()  # what the model allows; the engine makes its own
    except Exception as error:
        raise EvalError(f"vLLM does not take {job['model']}: {error}") from error
    tokenizer = cached_tokenizer_from_config(config)
    vocabulary = digest(json.dumps(sorted(tokenizer.get_vocab().items())))
    if reference is not None:
        check_vocabulary(vocabulary, job["model"], reference)
        windows, files = reference.windows(), reference.files.tolist()
        texts, context, top_k = (reference.meta[key] for key in ("files", "context", "top_k"))
    else:
        texts = [{"name": name, "sha256": digest(text)} for name, text in job["texts"]]
        context, top_k = job["context"] or min(CONTEXT, config.max_model_len - 1), job["top_k"]
        windows, files = cut_texts(job["texts"], tokenizer, context)
    top_k = min(top_k, config.get_vocab_size())
    longest = max(map(len, windows))
    if longest >= config.max_model_len:
        raise EvalError(
            f"windows of {longest} tokens need --max-model-len {longest + 1}, for the one that "
            f"vLLM generates; {job['model']} has {config.max_model_len}. Record with a smaller "
            "--context"
        )
    engine.max_model_len = engine.max_model_len or longest + 1
    engine.max_logprobs, engine.logprobs_mode = top_k, "raw_logprobs"
    engine.disable_log_stats = True
    meta = {
        "format": FORMAT,
        "model": job["model"],
        "arguments": job["arguments"],
        "quantization": config.quantization,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": device(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "top_k": top_k,
        "context": context,
        "vocabulary": vocabulary,
        "files": texts,
    }
    actual, ids, logprobs = zip(*predict(LLM.from_engine_args(engine), windows, top_k), strict=True)
    recording = Recording(
        meta,
        np.concatenate([np.asarray(window, dtype=np.int32) for window in windows]),
        np.asarray([len(window) for window in windows], dtype=np.int32),
        np.asarray(files, dtype=np.int32),
        np.concatenate(actual),
        np.concatenate(ids),
        np.concatenate(logprobs),
    )
    bad = int(np.isnan(recording.top_logprobs).any(1).sum())
    if bad:
        raise EvalError(
            f"{job['model']} gives NaN at {bad} of {len(recording.actual)} positions: it is not "
            "served correctly, and there is nothing to compare"
        )
    return recording


def engine_args(model: str, arguments: Sequence[str]) -> Any:
    """vLLM's EngineArgs of its command line options; EvalError for what it does not know."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def fail(message: str) -> NoReturn:
        raise EvalError(f"options for vLLM, which are those of `vllm serve`: {message}")

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.error = fail
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))


def cut_texts(
    texts: Sequence[Sequence[str]], tokenizer: Any, context: int
) -> tuple[list[list[int]], list[int]]:
    """Texts [name, text] -> windows of at most `context` tokens, and the text of each.

    Windows do not overlap. If the tokenizer begins a text with its <bos>, every window has one.
    """
    windows: list[list[int]] = []
    files: list[int] = []
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []
    for index, (name, text) in enumerate(texts):
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        size = context - len(begin)
        own = [begin + ids[i : i + size] for i in range(0, len(ids), size)]
        own = [window for window in own if len(window) > 1]
        if not own:
            raise EvalError(f"{name}: {len(ids)} tokens; there is nothing to predict")
        windows += own
        files += [index] * len(own)
    return windows, files


def predict(llm: Any, windows: list[list[int]], top_k: int) -> Iterator[tuple[Any, Any, Any]]:
    """actual [n - 1], top_ids and top_logprobs [n - 1, k] of each window of n tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=top_k,
        detokenize=False,
        flat_logprobs=True,
    )
    done = 0
    for batch in batches(windows, BATCH_ENTRIES // (top_k + 1)):
        prompts = [{"prompt_token_ids": window} for window in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for window, output in zip(batch, outputs, strict=True):
            yield unpack(output.prompt_logprobs, len(window) - 1, top_k)
        done += len(batch)
        print(f"vllm-ue8m0 eval: {done} of {len(windows)} windows", file=sys.stderr, flush=True)


def batches(windows: list[list[int]], num_tokens: int) -> Iterator[list[list[int]]]:
    """Consecutive windows, one or more, of num_tokens at most."""
    batch: list[list[int]] = []
    size = 0
    for window in windows:
        if batch and size + len(window) > num_tokens:
            yield batch
            batch, size = [], 0
        batch.append(window)
        size += len(window)
    if batch:
        yield batch


def unpack(flat: Any, rows: int, top_k: int) -> tuple[Any, Any, Any]:
    """Of vLLM's FlatLogprobs: nothing for the first token, then the text's own and the k best."""
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(rows, top_k + 1)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(rows, top_k + 1)
    return logprobs[:, 0].copy(), ids[:, 1:].copy(), logprobs[:, 1:].copy()


def device() -> str:
    """The GPUs, or CPU."""
    import torch

    if not torch.cuda.is_available():
        return "CPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
