"""`vllm-ue8m0 eval` on the fixture: what vLLM is asked for is what the model predicts."""

import json

import numpy as np
import pytest
import torch
from harness import FIXTURES, GPU, SMALL_OPTIONS, kl, run_vllm
from recordings import recording
from tiny_deepseek.checkpoint import encode
from tiny_deepseek.model import CUDA, Rounding, TinyDeepseek

from vllm_ue8m0.cli import main
from vllm_ue8m0.evaluate.recording import read, write

MODEL = FIXTURES / "tiny_deepseek"
pytestmark = pytest.mark.vllm


def test_eval(tmp_path, capsys):
    """Recorded by vLLM, then held against the training forward, whose logits are all known."""
    text = (FIXTURES / "heldout.txt").read_text()
    for name, part in (("a.txt", text[:700]), ("b.txt", text[700:1000])):
        (tmp_path / name).write_text(part)
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    out = run_vllm(
        "-m", "vllm_ue8m0.cli", "eval", MODEL, "--text", *texts, "--context", 256, "--top-k", 40,
        "--out", tmp_path / "served.npz", "--json", "--", "--quantization", "ue8m0",
        "--enforce-eager", *SMALL_OPTIONS, stdout_only=True,
    )  # fmt: skip
    (line,) = out.splitlines()  # what vLLM logs is not on stdout
    served, scored = read(tmp_path / "served.npz"), json.loads(line)
    ids = encode(text.encode()).tolist()
    expected = [ids[:255], ids[255:510], ids[510:700], ids[700:955], ids[955:1000]]
    assert served.windows() == [[256, *part] for part in expected]  # 256 is <bos>
    assert served.meta["quantization"] == "ue8m0" and served.files.tolist() == [0, 0, 0, 1, 1]
    assert scored["candidate"] == served.meta and scored["reference"] is None

    model = TinyDeepseek.from_checkpoint(MODEL)
    rounding = CUDA if GPU else Rounding()

    def truth(activation_scale):
        with torch.no_grad():
            return [
                model(torch.tensor([w]), activation_scale, rounding=rounding)[0][0, :-1].float()
                for w in served.windows()
            ]

    trained, plain = truth("ue8m0"), truth("none")
    for name, logits in (("trained", trained), ("plain", plain)):
        made = recording(
            [part.numpy() for part in logits], served.windows(), 40, served.files.tolist(),
            **{key: served.meta[key] for key in ("vocabulary", "files")},
        )  # fmt: skip
        write(tmp_path / f"{name}.npz", made)

    def score(candidate, reference):
        files = [str(tmp_path / f"{name}.npz") for name in (candidate, reference)]
        assert main(["eval", files[0], "--reference", files[1], "--json"]) == 0
        return json.loads(capsys.readouterr().out)["total"]

    close, far = score("served", "trained"), score("served", "plain")
    assert close["tokens"] == 1000 and close["windows"] == 5
    assert scored["total"]["perplexity"] == close["perplexity"]
    assert close["perplexity"] == pytest.approx(close["reference_perplexity"], rel=0.02)
    assert close["kl"] < (0.01 if GPU else 1e-3)
    # Recordings of 40 of 258 tokens against both forwards' full logits.
    full, bound = kl(plain, trained), score("trained", "plain")["kl"]
    print(f"served {close}, without rounded activations {far}, bound {bound} of {full}")
    assert 0.95 * full < bound <= full
    order = np.diff(served.top_logprobs, axis=1)
    assert (order <= 0).all() and (served.top_logprobs < 1e-6).all()
    closer = close["kl"] < far["kl"] and close["top1"] > far["top1"]
    if GPU and not closer:  # test_served_equals_the_training_forward says why
        pytest.xfail("FP8 tensor cores' 14 bits are as far as rounded activations")
    assert closer
