"""`vllm serve` and every example, as a user runs them."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from harness import FIXTURES, SMALL_OPTIONS, run_vllm
from server import serve

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = FIXTURES / "tiny_deepseek"
pytestmark = pytest.mark.vllm


def post(url, **body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return reply.read().decode()


def test_api_server_and_client(tmp_path):
    args = ["--quantization", "ue8m0", "--enforce-eager", "--served-model-name", "tiny"]
    log = tmp_path / "server.log"
    with serve(MODEL, *args, *SMALL_OPTIONS, log=log) as url:
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            assert json.load(reply)["data"][0]["id"] == "tiny"
        common = {"model": "tiny", "max_tokens": 8, "temperature": 0}
        completion = json.loads(post(f"{url}/v1/completions", prompt="The President", **common))
        assert completion["usage"]["completion_tokens"] == 8
        assert completion["choices"][0]["text"].strip()
        messages = [{"role": "user", "content": "Fellow citizens of the Senate"}]
        chat = json.loads(post(f"{url}/v1/chat/completions", messages=messages, **common))
        whole = chat["choices"][0]["message"]["content"]
        stream = post(f"{url}/v1/chat/completions", messages=messages, stream=True, **common)
        events = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        pieces = [json.loads(event)["choices"][0]["delta"].get("content") for event in events]
        assert len(pieces) > 3 and "".join(filter(None, pieces)) == whole
        done = subprocess.run(
            [sys.executable, EXAMPLES / "client.py", url, "The United States"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "completion:" in done.stdout and "chat:" in done.stdout
    assert "ue8m0: activation scales ue8m0; weight scales: linear layers" in log.read_text()


def test_example_offline():
    out = run_vllm(EXAMPLES / "offline.py", MODEL, "The United States", "We have")
    assert out.count("' -> '") == 2


def test_example_generate_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("The United States\nWe have\n")
    args = ["--ckpt-path", MODEL, "--max-new-tokens", 8, "--input-file", tmp_path / "prompts.txt"]
    out = run_vllm(EXAMPLES / "generate.py", *args)
    assert out.count("Completion:") == 2


def test_example_generate_interactive():
    out = run_vllm(
        EXAMPLES / "generate.py", "--ckpt-path", MODEL, "--max-new-tokens", 8, "--interactive",
        input="The United States\n/clear\nWe have\n/exit\n",
    )  # fmt: skip
    assert out.count(">>> ") == 4
