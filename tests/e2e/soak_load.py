"""Requests of a soak: mixed ones, drawn from a seed, and probes whose answers have to stay."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import aiohttp

MOST_FAILURES = 20  # then the rest is not asked
# Of so many requests, how many are of a kind.
DECK = Counter({"completion": 6, "chat": 4, "prefix": 3, "abort": 4, "too long": 2, "malformed": 2})
TEXT = (
    "Every scale is a power of two, kept as one exponent byte; the weights are 8-bit codes in "
    "blocks of 128 by 128, and activations are quantized in groups of 128 as they arrive. "
)
PROBE_TOKENS = 24
SETTLE_SECONDS = 10


@dataclass
class Counts:
    """failures: what was wrong, in sentences. seconds: of every request, by kind."""

    failures: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    load_seconds: float = 0.0


class Wrong(Exception):
    """An answer that is not what it has to be."""


class Load:
    """The load on one server, drawn from a seed."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int) -> None:
        self.session, self.url, self.random = session, url, random.Random(seed)
        self.counts = Counts()
        self.model, self.limit = "", 0
        self.tokens: list[int] = []
        self.deck: list[str] = []

    async def look(self) -> None:
        """What is served, and enough tokens for a prompt over its limit."""
        async with self.session.get(f"{self.url}/v1/models") as reply:
            (model, *_) = (await reply.json())["data"]
        self.model, self.limit = model["id"], model["max_model_len"]
        status, body = await self.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False})
        if status != 200:
            raise Wrong(f"/tokenize: {status} {body}")
        one = body["tokens"]
        self.tokens = one * (2 * self.limit // len(one) + 2)

    def draw(self, count: int) -> list[int]:
        """A prompt of so many tokens, mostly with a beginning of its own."""
        start = self.random.randrange(self.limit // 2)
        return self.tokens[start : start + count]

    async def post(self, path: str, body: dict | str) -> tuple[int, dict]:
        data = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url + path, data=data, headers=headers) as reply:
            text = await reply.text()
            try:
                return reply.status, json.loads(text)
            except ValueError:
                return reply.status, {"text": text}

    async def ask(self, path: str, body: dict) -> str:
        """The text of an answer, streamed or not, which has as many tokens as were asked for."""
        body = {"model": self.model, "ignore_eos": True, **body}
        if body.get("stream"):
            return await self._ask_stream(path, body)
        status, answer = await self.post(path, body)
        if status != 200:
            raise Wrong(f"{status}: {str(answer)[:300]}")
        (choice,) = answer["choices"]
        self._count(answer["usage"], body)
        return choice["text"] if "text" in choice else choice["message"]["content"]

    async def _ask_stream(self, path: str, body: dict) -> str:
        body = {**body, "stream_options": {"include_usage": True}}
        pieces, usage, last = [], None, ""
        async with self.session.post(self.url + path, json=body) as reply:
            if reply.status != 200:
                raise Wrong(f"{reply.status}: {(await reply.text())[:300]}")
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                last = line[6:].strip().decode()
                if last == "[DONE]":
                    continue
                event = json.loads(last)
                if "choices" not in event:
                    raise Wrong(f"in a stream: {last[:300]}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    pieces.append(choice["text"] if "text" in choice else _content(choice))
        if last != "[DONE]" or usage is None:
            raise Wrong(f"a stream ended with {last[:100]!r}, usage {usage}")
        self._count(usage, body)
        return "".join(pieces)

    def _count(self, usage: dict, body: dict) -> None:
        self.counts.tokens += usage["completion_tokens"]
        if usage["completion_tokens"] != body["max_tokens"]:
            raise Wrong(f"{usage['completion_tokens']} tokens of {body['max_tokens']}")

    def manner(self, most: int = 48) -> dict:
        return {
            "max_tokens": self.random.choice([1, 2, 7, most]),
            "temperature": self.random.choice([0, 1]),
            "stream": self.random.random() < 0.5,
        }

    async def completion(self) -> None:
        manner = self.manner()
        most = self.limit - manner["max_tokens"]
        length = self.random.choice([1, 2, 15, self.random.randint(3, most), most])
        await self.ask("/v1/completions", {"prompt": self.draw(length), **manner})

    async def chat(self) -> None:
        words = TEXT.split()
        messages = []
        for role in ("user", "assistant", "user")[: self.random.choice([1, 3])]:
            text = " ".join(self.random.choices(words, k=self.random.randint(1, 9)))
            messages.append({"role": role, "content": text})
        await self.ask("/v1/chat/completions", {"messages": messages, **self.manner(32)})

    async def prefix(self) -> None:
        """Half of the limit is the same every time, and then up to 20 tokens are not."""
        shared, tail = self.tokens[: self.limit // 2], self.draw(self.random.randint(0, 20))
        await self.ask("/v1/completions", {"prompt": shared + tail, **self.manner(16)})

    async def abort(self) -> None:
        """Leave before the answer has begun, or in the middle of it."""
        prompt = self.draw(self.random.choice([1, self.limit // 2]))
        body = {"model": self.model, "prompt": prompt, "ignore_eos": True, "stream": True}
        body["max_tokens"] = self.limit - len(prompt)
        if self.random.random() < 0.3:
            body["stream"], begun = False, time.monotonic()
            try:
                await asyncio.wait_for(self.post("/v1/completions", body), 0.3)
            except asyncio.TimeoutError:
                return
            if time.monotonic() - begun < 0.3:  # on a busy machine both may be due at once
                raise Wrong("an answer of the greatest length in 0.3 s")
            return
        async with self.session.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise Wrong(f"{reply.status}: {(await reply.text())[:300]}")
            for _ in range(self.random.choice([0, 1, 20])):
                await reply.content.readline()
            reply.close()

    async def too_long(self) -> None:
        """More than the limit is refused with 400 and a message that says so."""
        path, body = "/v1/completions", {"prompt": self.draw(self.limit + 1)}
        if self.random.random() < 0.5:
            path, content = "/v1/chat/completions", TEXT * (self.limit // 8)
            body = {"messages": [{"role": "user", "content": content}]}
        status, answer = await self.post(path, {"model": self.model, "max_tokens": 1, **body})
        message = _message(answer)
        if status != 400 or str(self.limit) not in message:
            raise Wrong(f"more than the limit of {self.limit} gave {status}: {message[:200]}")

    async def malformed(self) -> None:
        """What is no request is refused with 4xx and a message."""
        good = {"model": self.model, "prompt": "We", "max_tokens": 2}
        path, body = self.random.choice(
            [
                ("/v1/completions", "{"),
                ("/v1/completions", {"model": self.model, "max_tokens": 2, "prompt": []}),
                ("/v1/completions", {**good, "model": "nobody"}),
                ("/v1/completions", {**good, "max_tokens": -1}),
                ("/v1/completions", {**good, "temperature": "hot"}),
                ("/v1/completions", {**good, "logit_bias": {"999999999": 1.0}}),
                ("/v1/chat/completions", {**good, "messages": "We"}),
                ("/v1/chat/completions", {"model": self.model}),
            ]
        )
        status, answer = await self.post(path, body)
        if not 400 <= status < 500 or not _message(answer):
            raise Wrong(f"{str(body)[:100]} gave {status}: {str(answer)[:200]}")

    async def one(self) -> None:
        """One request of the next kind; what is wrong with it goes into the report."""
        if not self.deck:
            self.deck = [*DECK.elements()]
            self.random.shuffle(self.deck)
        kind, begun = self.deck.pop(), time.monotonic()
        try:
            await getattr(self, kind.replace(" ", "_"))()
        except (Wrong, KeyError, ValueError) as error:
            self.counts.failures.append(f"{kind}: {type(error).__name__} {error}")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self.counts.failures.append(f"{kind}: no answer, {type(error).__name__} {error}")
        self.counts.seconds[kind].append(time.monotonic() - begun)

    async def run(self, requests: int, clients: int, until: float) -> None:
        """So many requests, or until a time on the monotonic clock."""
        begun, left = time.monotonic(), requests

        async def client() -> None:
            nonlocal left
            while left > 0 and time.monotonic() < until:
                if len(self.counts.failures) > MOST_FAILURES:
                    return
                left -= 1
                await self.one()

        await asyncio.gather(*(client() for _ in range(clients)))
        self.counts.load_seconds += time.monotonic() - begun

    async def probe(self) -> list[str]:
        """Greedy answers, each asked for alone and without what a prefix cache holds."""
        greedy = {"max_tokens": PROBE_TOKENS, "temperature": 0}
        longest = self.limit - PROBE_TOKENS
        lengths = [1, 5, 60, min(300, longest), longest]
        bodies = [{"prompt": self.tokens[3 : 3 + length]} for length in lengths]
        bodies.append({"messages": [{"role": "user", "content": TEXT[:80]}]})
        answers = []
        for body in bodies:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            salt = f"{time.monotonic_ns()}"  # the cache's entries are those of this request alone
            answers.append(await self.ask(path, {**body, **greedy, "cache_salt": salt}))
        return answers

    async def left(self) -> float:
        """Requests that the server is at, when it had time to see who left; NaN if unknown."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            async with self.session.get(f"{self.url}/metrics") as reply:
                lines = (await reply.text()).splitlines()
            counts = [float(line.split()[-1]) for line in lines if line.startswith(names)]
            left = sum(counts) if counts else float("nan")
            if left == 0 or time.monotonic() > until:
                return left
            await asyncio.sleep(0.5)


def _content(choice: dict) -> str:
    return choice["delta"].get("content") or ""


def _message(answer: dict) -> str:
    """An error's message, where OpenAI's API has it."""
    error = answer.get("error", answer)
    return str(error.get("message", "")) if isinstance(error, dict) else ""
