"""The soak passes on our server, and sees every way in which a server may go wrong."""

import asyncio
import json
import subprocess
import sys
import time
from threading import Thread

import pytest
from harness import FIXTURES, HERE, SMALL_OPTIONS

aiohttp = pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from soak import Memory, log_errors, memory_of, of_processes, soak  # noqa: E402
from soak_load import DECK  # noqa: E402

LIMIT = 64


class Fake:
    """An OpenAI server that answers at once, with one fault: the name of a method, or none."""

    def __init__(self, fault=""):
        self.fault, self.asked, self.salts = fault, 0, set()

    def answer(self, body):
        count = body["max_tokens"]
        text = f"{body.get('prompt') or body['messages']}"[:40] if not body["temperature"] else "x"
        if self.fault == "answers change" and self.asked > 30:
            text += "!"
        return text, count - (self.fault == "short answers" and count > 7)

    async def handle(self, request):
        self.asked += 1
        if self.fault == "it dies" and self.asked > 20:
            request.transport.abort()
            raise asyncio.CancelledError
        try:
            body = await request.json()
            assert body["model"] == "fake" and body.get("max_tokens", 1) > 0
            prompt = body["prompt"] if "prompt" in body else body["messages"]
            assert len(prompt) and prompt != "We" and body.get("logit_bias") is None
            assert float(body.get("temperature", 1)) >= 0
        except (ValueError, KeyError, AssertionError):
            status = 500 if self.fault == "errors of its own" else 400
            return web.json_response({"error": {"message": "bad"}}, status=status)
        length = len(prompt) if "prompt" in body else len(prompt[0]["content"]) // 8
        if length > LIMIT and self.fault != "no limit":
            message = "" if self.fault == "no message" else f"more than {LIMIT}"
            return web.json_response({"error": {"message": message}}, status=400)
        if "cache_salt" in body:
            assert body["cache_salt"] not in self.salts
            self.salts.add(body["cache_salt"])
        if body["max_tokens"] > 40:
            await asyncio.sleep(0.4)  # who asked for this leaves
        text, count = self.answer({"temperature": 1, **body})
        chat = "messages" in body
        usage = {"completion_tokens": count}
        if not body.get("stream"):
            part = {"message": {"content": text}} if chat else {"text": text}
            return web.json_response({"choices": [part], "usage": usage})
        reply = web.StreamResponse()
        await reply.prepare(request)
        part = {"delta": {"content": text}} if chat else {"text": text}
        events = [{"choices": [part]}, {"choices": [], "usage": usage}]
        lines = [*map(json.dumps, events)] + ["[DONE]"] * (self.fault != "streams break off")
        for line in lines:
            await reply.write(f"data: {line}\n\n".encode())
        return reply

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake", "max_model_len": LIMIT}]})

    async def tokenize(self, request):
        return web.json_response({"tokens": [*range(1, 38)]})

    async def metrics(self, request):
        left = 1.0 if self.fault == "requests are left" else 0.0
        lines = ["# TYPE x gauge", f'vllm:num_requests_running{{engine="0"}} {left}']
        return web.Response(text="\n".join(lines) if self.fault != "no metrics" else "")


async def start(fake, **options):
    """(What serves it and has to be cleaned up, its address.)"""
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/metrics", fake.metrics)
    app.router.add_post("/tokenize", fake.tokenize)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, fake.handle)
    runner = web.AppRunner(app, **options)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def report(fault="", growth=(0, 0, 0), requests=60):
    """Of a soak of a faulty server, whose memory is 1,000 MiB and more each time."""
    memory = iter([Memory(1000 + more, 500 + more) for more in growth])

    async def run():
        runner, url = await start(Fake(fault))
        try:
            return await soak(url, lambda: next(memory), requests, 1)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_connections_that_a_server_closes_are_no_failure():
    """Measuring takes longer than it keeps idle ones; it runs apart, and so closes them then."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()

    def elsewhere(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def measure():
        time.sleep(0.9)
        return Memory(1000, None)

    runner, url = elsewhere(start(Fake(), keepalive_timeout=0.3))
    try:
        assert asyncio.run(soak(url, measure, 24, 1)).failures == []
    finally:
        elsewhere(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_good_server_passes():
    found = report()
    assert found.failures == [] and found.probes == 6 and found.counts.tokens > 60
    assert found.to_json()["requests"].keys() == DECK.keys()
    assert sum(found.to_json()["requests"].values()) == 60
    assert [*found.memory] == ["before", "after a third", "at the end"]
    assert "FAILED" not in found.text()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("answers change", "a probe's answer was"),
        ("it dies", "no answer, Server"),
        ("short answers", "23 tokens of 24"),
        ("streams break off", "a stream ended with"),
        ("errors of its own", "gave 500"),
        ("no limit", f"more than the limit of {LIMIT} gave 200"),
        ("no message", f"more than the limit of {LIMIT} gave 400: "),
        ("requests are left", "1.0 requests are running or waiting"),
        ("no metrics", "nan requests are running"),
    ],
)
def test_a_fault_is_seen(monkeypatch, fault, words):
    monkeypatch.setattr("soak_load.SETTLE_SECONDS", 0.1)
    found = report(fault)
    assert any(words in failure for failure in found.failures), found.failures
    assert f"FAILED: {found.failures[0]}" in found.text()


def test_growth_is_seen():
    assert report(growth=(0, 300, 500), requests=9).failures == []  # what it takes at first is its
    failures = report(growth=(0, 0, 300), requests=9).failures
    assert failures == [f"{name} grew by 300 MiB, allowed are 256" for name in ("rss", "gpu")]


def test_errors_in_a_log():
    log = "INFO ok\n(EngineCore pid=7) ERROR 11-23 x\nTraceback (most recent call last):\nERRORS 0"
    assert len(log_errors(log)) == 2


def test_gpu_memory_of_processes():
    listed = "12, 500\n345, 1024\n7, [N/A]\n345, 76\n"
    assert of_processes(listed, [345, 7, 1]) == 1100
    assert of_processes(listed, [7, 34]) is None
    assert of_processes("", [12]) is None


def test_memory_of_a_session():
    code = "import time; kept = bytearray(64 << 20); print(1, flush=True); time.sleep(60)"
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        started.stdout.readline()
        assert 64 < memory_of(started.pid).rss < 256
    finally:
        started.kill()
        started.communicate()


@pytest.mark.vllm
def test_our_server(tmp_path):
    """Every kind of request, on the served tiny model; 60 to 80 s on two cores."""
    pytest.importorskip("vllm")
    program = [sys.executable, HERE / "soak.py", FIXTURES / "tiny_deepseek"]
    options = ["--requests", "42", "--minutes", "3", "--enforce-eager", *SMALL_OPTIONS]
    done = subprocess.run(
        [*program, *options, "--log", tmp_path / "log"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == [] and sum(found["requests"].values()) == 42
    assert found["requests"].keys() == DECK.keys() and found["probes"] == 6
    assert "ue8m0: activation scales ue8m0" in (tmp_path / "log").read_text()
