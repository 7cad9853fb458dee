"""`bench e2e --only serve` around a made-up vLLM: what it is asked, what may not be recorded."""

import json
import os
import sys
import time

import pytest

from vllm_ue8m0.bench import BenchError, e2e_serve, e2e_worker

ENGINE = {
    "quantization": "ue8m0", "skip_tokenizer_init": True, "max_model_len": 99, "seed": None,
    "enable_prefix_caching": False, "kv_cache_dtype": "fp8", "compilation_config": {"mode": 0},
    "enforce_eager": True,
}  # fmt: skip
# As `vllm serve` and `vllm bench serve`; every call is a line of FILE.
FAKE = """
import json, os, sys, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
def say(*what):
    with open({file!r}, "a") as log:
        print(json.dumps(what), file=log)
args = sys.argv[1:]
say(args, os.environ.get("VLLM_SERVER_DEV_MODE"))
value = lambda name: args[args.index(name) + 1]
if args[0] == "bench":
    prompts = int(value("--num-prompts"))
    again = os.path.exists({file!r} + value("--request-rate"))
    open({file!r} + value("--request-rate"), "w").close()
    result = {{
        "completed": prompts, "total_input_tokens": 20 * prompts,
        "total_output_tokens": 5 * prompts,
        "median_ttft_ms": 3.5 if again else 70, "median_tpot_ms": float(value("--request-rate")),
        "p99_ttft_ms": 9, "p99_tpot_ms": 8, "request_throughput": 1.5,
    }}
    if {fault!r} != "no result":
        with open(os.path.join(value("--result-dir"), value("--result-filename")), "w") as file:
            json.dump(result | {change}, file)
    sys.exit(0)
if {fault!r} == "no server":
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
say("child", child.pid)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        method = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["method"]
        say("rpc", method)
        self.send_response(500 if {fault!r} == "no rpc" else 200)
        self.end_headers()
        self.wfile.write(b'{{"results": [{{"gpu": "Test GPU"}}]}}')
    def log_message(self, *args): pass
HTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
"""


def measured(monkeypatch, folder, fault="", change=None, loads=((2.0, 20.0), (0.5, 4.0))):
    """Results, and the calls of the fake."""
    program, log = folder / "fake.py", folder / "calls"
    program.write_text(FAKE.format(file=str(log), fault=fault, change=change or {}))
    monkeypatch.setattr(e2e_serve, "_VLLM", (sys.executable, str(program)))
    model = folder / "model"
    model.mkdir()
    engine = {"model": str(model), **ENGINE}
    try:
        results = list(e2e_serve.measure(engine, 300, dict(os.environ), (20, 5), loads))
    finally:
        calls = [json.loads(line) for line in log.read_text().splitlines()]
    return results, calls


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_measure(monkeypatch, tmp_path):
    results, calls = measured(monkeypatch, tmp_path)
    times = {"ttft_us": 3500.0, "ttft_p99_us": 9000.0, "tpot_p99_us": 8000.0}
    common = {"gpu": "Test GPU", "requests_per_s": 1.5, **times, "first_ttft_us": 70000.0}
    assert results == [
        {**common, "tpot_us": tpot, "first_tpot_us": tpot} for tpot in (2000.0, 500.0)
    ]
    (serve, dev_mode), (_, child), fill, describe, *clients = calls
    (first, client_mode), again, (second, _), last = clients
    assert again == [first, client_mode] and last == [second, client_mode]
    assert dev_mode == "1" and client_mode is None
    assert [fill, describe] == [["rpc", "ue8m0_fill"], ["rpc", "ue8m0_describe"]]
    assert serve[:2] == ["serve", str(tmp_path / "model")]
    options = " ".join(serve)
    for words in (
        "--quantization ue8m0", "--max-model-len 99", "--enforce-eager", "--kv-cache-dtype fp8",
        "--no-enable-prefix-caching", '--compilation-config {"mode": 0}',
        "--worker-extension-cls vllm_ue8m0.bench.e2e_worker.Extension",
    ):  # fmt: skip
        assert words in options
    assert "skip-tokenizer" not in options and "seed" not in options
    assert first[:2] == ["bench", "serve"]
    assert "--num-prompts 40 --request-rate 2 " in " ".join(first)
    assert "--num-prompts 8 --request-rate 0.5 " in " ".join(second)
    assert "--random-input-len 20 --random-output-len 5" in " ".join(second)
    time.sleep(0.1)
    assert not alive(child)  # what a server started ends with it


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no server", "the server ended with status 3"),
        ("no rpc", "the server did not do ue8m0_fill: HTTP Error 500"),
        ("no result", "`vllm bench serve` ended with status 0"),
    ],
)
def test_what_fails_is_said(monkeypatch, tmp_path, fault, words):
    with pytest.raises(BenchError, match=words):
        measured(monkeypatch, tmp_path, fault)


@pytest.mark.parametrize(
    "change", [{"completed": 39}, {"total_input_tokens": 801}, {"total_output_tokens": 199}]
)
def test_what_was_not_answered_whole_is_not_recorded(monkeypatch, tmp_path, change):
    with pytest.raises(BenchError, match=f"{next(iter(change))}': {next(iter(change.values()))}"):
        measured(monkeypatch, tmp_path, change=change)


def test_times_that_are_missing():
    result = {"completed": 1, "total_input_tokens": 2, "total_output_tokens": 3}
    with pytest.raises(BenchError, match="nothing of median_ttft_ms, median_tpot_ms, p99"):
        e2e_serve.read(result, 1, (2, 3))


def test_tokenizer(tmp_path):
    """Any tokens are text, and that text is those tokens."""
    transformers = pytest.importorskip("transformers")
    e2e_serve.write_tokenizer(tmp_path, 300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == 300
    assert tokenizer.num_special_tokens_to_add() == 0
    tokens = [299, 0, 7, 7, 128]
    text = tokenizer.decode(tokens)
    assert text == "t299 t0 t7 t7 t128" and tokenizer.encode(text) == tokens


def test_extension(monkeypatch):
    """What the server is told to call are the same functions as those of the other starts."""
    extension = e2e_worker.Extension()
    monkeypatch.setattr(e2e_worker, "fill", lambda worker: worker is extension and 7)
    monkeypatch.setattr(e2e_worker, "describe", lambda worker: {"gpu": worker is extension})
    assert extension.ue8m0_fill() == 7 and extension.ue8m0_describe() == {"gpu": True}
