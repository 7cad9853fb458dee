"""What is asked of vLLM and what is made of its answer, with a vLLM that is made up."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from recordings import made_up, recording

from vllm_ue8m0.evaluate import EvalError, recorder
from vllm_ue8m0.evaluate.recording import read, write


class Tokenizer:
    """A token a character; <bos> is 0 and begins a text unless told otherwise."""

    def __init__(self, bos=0, adds=True):
        self.bos_token_id, self.adds = bos, adds

    def encode(self, text, add_special_tokens=True):
        begin = [self.bos_token_id] if add_special_tokens and self.adds else []
        return begin + [ord(letter) - 96 for letter in text]

    def get_vocab(self):
        return {chr(96 + i): i for i in range(30)}


class Engine:
    """vLLM's EngineArgs, LLM and FlatLogprobs, as far as the recorder uses them."""

    def __init__(self, max_model_len=None, limit=12, vocabulary=30):
        self.max_model_len = max_model_len
        self.config = SimpleNamespace(
            max_model_len=max_model_len or limit, quantization="ue8m0", dtype="torch.bfloat16",
            get_vocab_size=lambda: vocabulary,
        )  # fmt: skip
        self.calls = []

    def create_model_config(self):
        return self.config

    def generate(self, prompts, params, use_tqdm):
        self.calls.append([prompt["prompt_token_ids"] for prompt in prompts])
        return [SimpleNamespace(prompt_logprobs=self.answer(p, params)) for p in self.calls[-1]]

    def answer(self, tokens, params):
        k, rows = params.prompt_logprobs, range(1, len(tokens))
        ids = [token for i in rows for token in (tokens[i], *range(i, i + k))]
        logprobs = [x for i in rows for x in (-tokens[i], *(-i - j / 10 for j in range(k)))]
        return SimpleNamespace(token_ids=ids, logprobs=logprobs)


@pytest.fixture
def serve(monkeypatch):
    """serve(engine, tokenizer) makes the recorder use them."""

    def use(engine, tokenizer=None):
        vllm, tokenizers = ModuleType("vllm"), ModuleType("vllm.tokenizers")
        vllm.LLM = SimpleNamespace(from_engine_args=lambda args: args)
        vllm.SamplingParams = lambda **kwargs: SimpleNamespace(**kwargs)
        tokenizers.cached_tokenizer_from_config = lambda config: tokenizer or Tokenizer()
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setitem(sys.modules, "vllm.tokenizers", tokenizers)
        monkeypatch.setattr(recorder, "engine_args", lambda model, arguments: engine)
        return engine

    return use


def job(texts=(("a.txt", "abcdefghijklm"), ("b.txt", "xy")), **values):
    return {"model": "M", "arguments": ["--x"], "texts": texts, "context": None, "top_k": 3,
            **values}  # fmt: skip


def test_record(serve):
    engine = serve(Engine())
    found = recorder.record(job())
    # 12 tokens fit, one of them generated; a <bos> begins each window.
    assert found.windows() == [[0, *range(1, 11)], [0, 11, 12, 13], [0, 24, 25]]
    assert found.files.tolist() == [0, 0, 1]
    assert engine.max_model_len == 12 and engine.max_logprobs == 3
    assert engine.logprobs_mode == "raw_logprobs"
    assert found.actual.tolist() == [-float(token) for token in found.targets()]
    assert found.top_ids[:2].tolist() == [[1, 2, 3], [2, 3, 4]]
    np.testing.assert_allclose(found.top_logprobs[1], [-2, -2.1, -2.2])
    meta = found.meta
    assert (meta["model"], meta["arguments"], meta["quantization"]) == ("M", ["--x"], "ue8m0")
    assert (meta["dtype"], meta["top_k"], meta["context"]) == ("bfloat16", 3, 11)
    assert [file["name"] for file in meta["files"]] == ["a.txt", "b.txt"]
    assert len(meta["vocabulary"]) == 64 and meta["versions"]["vllm_ue8m0"]


def test_the_references_tokens_are_taken(serve, tmp_path):
    serve(Engine())
    write(tmp_path / "a.npz", recorder.record(job(context=6)))
    serve(Engine(limit=100))
    found = recorder.record({"model": "N", "arguments": [], "reference": str(tmp_path / "a.npz")})
    reference = read(tmp_path / "a.npz")
    assert found.windows() == reference.windows() and found.files.tolist() == [0, 0, 0, 1]
    assert found.meta["files"] == reference.meta["files"] and found.meta["context"] == 6


def test_another_vocabulary_is_refused_before_loading(serve, tmp_path):
    windows, logits, _ = made_up(1)
    write(tmp_path / "a.npz", recording(logits, windows, 3))
    engine = serve(Engine())
    with pytest.raises(EvalError, match="M and made-up have different vocabularies"):
        recorder.record({**job(), "reference": str(tmp_path / "a.npz")})
    assert engine.calls == []


def test_windows_that_do_not_fit_are_refused(serve):
    serve(Engine(max_model_len=8))
    with pytest.raises(EvalError, match=r"windows of 10 tokens need --max-model-len 11, .* has 8"):
        recorder.record(job(context=10))
    serve(Engine(max_model_len=11))
    assert recorder.record(job(context=10)).lengths.max() == 10


def test_no_more_tokens_are_asked_for_than_there_are(serve):
    serve(Engine(vocabulary=2))
    assert recorder.record(job()).top_ids.shape[1] == 2


def test_nan_is_refused(serve, monkeypatch):
    engine = serve(Engine())
    answer = engine.answer

    def broken(tokens, params):
        flat = answer(tokens, params)
        flat.logprobs[1] = float("nan")
        return flat

    engine.answer = broken
    with pytest.raises(EvalError, match="NaN at 3 of 15 positions"):
        recorder.record(job())


def test_what_vllm_refuses_is_told(serve):
    engine = serve(Engine())

    def refuse():
        raise ValueError("no such model")

    engine.create_model_config = refuse
    with pytest.raises(EvalError, match="vLLM does not take M: no such model"):
        recorder.record(job())


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Tokenizer(), [[0, 1, 2], [0, 3, 4]]),
        (Tokenizer(adds=False), [[1, 2, 3]]),  # a window of one token, the last, predicts nothing
        (Tokenizer(bos=None, adds=False), [[1, 2, 3]]),
    ],
)
def test_bos_begins_windows_where_it_begins_texts(tokenizer, expected):
    windows, files = recorder.cut_texts([("a.txt", "abcd")], tokenizer, 3)
    assert windows == expected and files == [0] * len(expected)


def test_a_text_of_no_tokens_is_refused():
    with pytest.raises(EvalError, match=r"b\.txt: 0 tokens"):
        recorder.cut_texts([("a.txt", "ab"), ("b.txt", "")], Tokenizer(), 5)


def test_batches():
    windows = [[1] * n for n in (3, 3, 4, 9, 1)]
    sizes = [[len(w) for w in batch] for batch in recorder.batches(windows, 7)]
    assert sizes == [[3, 3], [4], [9], [1]]


def test_main_writes_a_file_or_an_error(serve, tmp_path):
    serve(Engine())
    files = {"out": str(tmp_path / "a.npz"), "error": str(tmp_path / "error")}
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**job(), **files}))
    assert recorder.main(str(path)) == 0
    assert len(read(files["out"]).lengths) == 3 and not (tmp_path / "error").exists()
    path.write_text(json.dumps({**job(texts=[("a.txt", "")]), **files}))
    assert recorder.main(str(path)) == 1
    assert (tmp_path / "error").read_text() == "a.txt: 0 tokens; there is nothing to predict"
