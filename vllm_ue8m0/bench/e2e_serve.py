"""Serving under load: one side's OpenAI server, asked by vLLM's own `vllm bench serve`, for e2e.py.

The model has weights from e2e_worker.py, by way of an extension of vLLM's workers, and a made-up
tokenizer, whose words are its tokens: the client counts and draws tokens by it, the server reads
text.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import BenchError
from .e2e_process import started

_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_EXTENSION = f"{__package__}.e2e_worker.Extension"
START_SECONDS = 3600
WARM_UPS, LEAST_PROMPTS = 8, 8
STDERR = 2  # the file descriptor; sys.stderr may be something else


def measure(
    engine: Mapping[str, Any], vocabulary: int, env: Mapping[str, str], tokens: tuple[int, int],
    loads: Sequence[tuple[float, float]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """What clients see of a server with vLLM's arguments `engine`, for each load, sent twice.

    Counted is the second time, because a server may compile during the first; what clients saw
    then is kept too, as `first_...`.

    tokens: of a prompt and of its answer. loads: requests a second, and for how many seconds.
    BenchError if the server does not start, or does not answer everything.
    """
    folder = Path(engine["model"])
    write_tokenizer(folder, vocabulary)
    with _serve(engine, env) as url:
        _rpc(url, "ue8m0_fill")
        (worker, *_) = _rpc(url, "ue8m0_describe")
        for rate, seconds in loads:
            prompts, file = max(LEAST_PROMPTS, round(rate * seconds)), folder / "result.json"
            command = [*_VLLM, *client_options(url, str(folder), tokens, prompts, rate, file)]
            first, again = (_client(command, env, file, prompts, tokens) for _ in range(2))
            seen = {f"first_{name}": first[name] for name in ("ttft_us", "tpot_us")}
            yield {**worker, **again, **seen}


def _client(
    command: Sequence[str], env: Mapping[str, str], file: Path, prompts: int,
    tokens: tuple[int, int],
) -> dict[str, float]:  # fmt: skip
    """One load, sent by `vllm bench serve`, which writes into `file`."""
    file.unlink(missing_ok=True)
    status = subprocess.run(command, env=dict(env), stdout=STDERR, check=False).returncode
    if not file.exists():
        raise BenchError(f"`vllm bench serve` ended with status {status}; see above")
    return read(json.loads(file.read_text(encoding="utf-8")), prompts, tokens)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of so many words, `t0 t1 ...`: any text of them has as many tokens as words."""
    model = {
        "type": "WordLevel",
        "vocab": {f"t{token}": token for token in range(vocabulary)},
        "unk_token": "t0",
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def server_options(engine: Mapping[str, Any]) -> list[str]:
    """Arguments of vLLM's LLM as `vllm serve` takes them, and with them what `measure` needs."""
    found = ["serve", str(engine["model"])]
    for name, value in engine.items():
        option = name.replace("_", "-")
        if name in ("model", "skip_tokenizer_init") or value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return [*found, "--worker-extension-cls", _EXTENSION, "--uvicorn-log-level", "warning"]


def client_options(
    url: str, model: str, tokens: tuple[int, int], prompts: int, rate: float, file: Path
) -> list[str]:
    """Of `vllm bench serve`, 0.26 to 0.33: the same prompts and times of arrival on both sides."""
    options = {
        "base-url": url, "model": model, "dataset-name": "random", "seed": 0,
        "random-input-len": tokens[0], "random-output-len": tokens[1], "num-prompts": prompts,
        "request-rate": f"{rate:g}", "num-warmups": WARM_UPS, "temperature": 0,
        "percentile-metrics": "ttft,tpot", "result-dir": file.parent, "result-filename": file.name,
    }  # fmt: skip
    pairs = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["bench", "serve", *pairs, "--ignore-eos", "--save-result", "--disable-tqdm"]


def read(result: Mapping[str, Any], prompts: int, tokens: tuple[int, int]) -> dict[str, float]:
    """Times of what `vllm bench serve` saved: until the first token, and for each token after it.

    BenchError if not every prompt was of these tokens and had such an answer.
    """
    expected = {
        "completed": prompts,
        "total_input_tokens": prompts * tokens[0],
        "total_output_tokens": prompts * tokens[1],
    }
    found = {name: result.get(name) for name in expected}
    if found != expected:
        raise BenchError(f"`vllm bench serve` reports {found}, expected {expected}; see above")
    names = {"ttft_us": "median_ttft_ms", "tpot_us": "median_tpot_ms"}
    names |= {"ttft_p99_us": "p99_ttft_ms", "tpot_p99_us": "p99_tpot_ms"}
    missing = [name for name in names.values() if name not in result]
    if missing:
        raise BenchError(f"`vllm bench serve` says nothing of {', '.join(missing)}")
    times = {name: 1e3 * result[key] for name, key in names.items()}
    return {**times, "requests_per_s": result["request_throughput"]}


@contextlib.contextmanager
def _serve(engine: Mapping[str, Any], env: Mapping[str, str]) -> Iterator[str]:
    """The server's address, once it takes requests; it prints on our stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*_VLLM, *server_options(engine), "--host", "127.0.0.1", "--port", str(port)]
    # The endpoint that calls functions of workers is one for developers.
    with started(command, {**env, "VLLM_SERVER_DEV_MODE": "1"}, stdout=STDERR) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", process)
        yield url


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            raise BenchError(f"the server ended with status {process.returncode}; see above")
        if time.monotonic() > until:
            raise BenchError(f"the server did not start in {START_SECONDS} s")
        time.sleep(1)


def _rpc(url: str, method: str) -> list[Any]:
    """A method of the workers' extension; what each of them returned."""
    request = urllib.request.Request(
        f"{url}/collective_rpc", json.dumps({"method": method}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=START_SECONDS) as reply:
            results: list[Any] = json.load(reply)["results"]
    except OSError as error:
        raise BenchError(f"the server did not do {method}: {error}; see above") from error
    return results
