"""The OpenAI-compatible face of the emulated engine."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from typing import Any
from zlib import crc32

import numpy as np

from kit.emulator.answers import scripted, words
from kit.emulator.clock import Call, Clock, Paced
from kit.emulator.hidden import hide
from kit.emulator.http import STREAM_HEAD, Connection
from kit.emulator.page import Page
from kit.emulator.prefix import TOKEN_BYTES, PrefixTree, chat_text, token_ids
from kit.engine_config import ResolvedConfig
from kit.scheduler import SchedulerConfig
from kit.simulator import StepTime

Body = dict[str, Any]
Answer = str | list[Body]  # text, or tool calls
NATURAL_TOKENS = 32, 256  # shortest and longest answer that is not told how long to be


class RefusedError(Exception):
    """An answer other than 200: status and message."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is emulated; `seed` hides another machine behind it, `pace_s` replaces it by a pace (TTFT, ITL)."""

    model_name: str
    config: ResolvedConfig
    limits: SchedulerConfig
    step_time: StepTime
    seed: int | None = None
    pace_s: tuple[float, float] | None = None


class Generation(Call):
    """One call: what its client gets, token by token or at once."""

    __slots__ = ("answer", "api", "chat", "connection", "events", "finish", "head", "stream", "usage")

    def begin(self, api: "Api", connection: Connection, body: Body, answer: Answer, finish: str, extra: int) -> None:
        """Tie it to its client and to what will be said."""
        self.api, self.connection, self.answer, self.finish = api, connection, answer, finish
        self.chat, self.stream = "messages" in body, bool(body.get("stream"))
        self.usage = (body.get("stream_options") or {}).get("include_usage")
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        kind += ".chunk" if self.chat and self.stream else ""
        self.head = {"id": f"{prefix}-{self.key}", "object": kind, "created": int(time.time())}
        self.head |= {"model": api.machine.model_name, "system_fingerprint": "emulated"}
        self.events = _events(self.head, answer, self.chat, extra)
        connection.call = self
        if self.stream:
            connection.write(STREAM_HEAD)

    def token(self, last: bool) -> None:
        """Write the token's event; with the last one all that ends an answer."""
        if self.stream:
            data = next(self.events)
            if last:
                data = data[: -len(_OPEN)] + b'"%b"}]}\n\n' % self.finish.encode()
                usage = {**self.head, "choices": [], "usage": self._counts()}
                data += b"data: %b\n\n" % json.dumps(usage).encode() if self.usage else b""
                data += b"data: [DONE]\n\n"
            self.connection.write(b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b""))
        elif last:
            called = isinstance(self.answer, list)
            message = {"role": "assistant", "content": None if called else self.answer}
            message |= {"tool_calls": self.answer} if called else {}
            said = {"message": message} if self.chat else {"text": self.answer}
            choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.finish}
            self.connection.reply(200, {**self.head, "choices": [choice], "usage": self._counts()})
        if last:
            self.api.clock.finished["length" if self.finish == "length" else "stop"] += 1
            self.connection.done()

    def _counts(self) -> Body:
        total, cached = self.input_len + self.output_len, {"cached_tokens": max(0, self.hit_tokens)}
        counts = {"prompt_tokens": self.input_len, "completion_tokens": self.output_len, "total_tokens": total}
        return {**counts, "prompt_tokens_details": cached}


_OPEN = b"null}]}\n\n"


def _events(head: Body, answer: Answer, chat: bool, extra: int) -> Iterator[bytes]:
    """Server-sent events, one per token; `extra` bytes of the first fill up the prompt's last token."""
    start = json.dumps({**head, "choices": [0]}).encode()[:-3]
    frame = b'data: %b{"index": 0, %b, "finish_reason": %b' % (start, b'"delta": %b' if chat else b'"text": %b', _OPEN)
    opening = frame % b'{"role": "assistant", "content": ""}' if chat else b""
    for part in _parts(answer, extra):
        shown = {"content": part} if chat and isinstance(part, str) else part
        yield opening + frame % json.dumps(shown).encode()
        opening = b""


def _parts(answer: Answer, extra: int) -> Iterator[str | Body]:
    """What each token shows: a bit of text, or of a tool call."""
    if isinstance(answer, str):
        yield answer[: TOKEN_BYTES + extra]
        yield from (answer[at : at + TOKEN_BYTES] for at in range(TOKEN_BYTES + extra, len(answer), TOKEN_BYTES))
        return
    for index, call in enumerate(answer):
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for part in _parts(call["function"]["arguments"], 0):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


class Api:
    """Requests in, calls to the clock, answers out."""

    def __init__(self, machine: Machine, loop: asyncio.AbstractEventLoop) -> None:
        self.machine, self.page = machine, Page(machine.config, machine.model_name)
        limits, step_time, truth = hide(machine.seed, machine.limits, machine.step_time)
        parts = limits, step_time, self.page, loop, truth, machine.seed or 0
        self.clock = Paced(machine.pace_s, *parts) if machine.pace_s else Clock(*parts)
        self.tree, self.keys = PrefixTree(limits.block_size), count(1)
        self.connections = set[Connection]()
        self.between, self.cancel = self.clock.poll, self.clock.cancel
        card = {"id": machine.model_name, "object": "model", "created": int(time.time()), "owned_by": "emulator"}
        card |= {"root": machine.model_name, "max_model_len": limits.max_model_len, "emulated": True}
        self.routes: dict[tuple[str, str], Any] = {
            ("GET", "/health"): lambda *_: "",
            ("GET", "/v1/models"): lambda *_: {"object": "list", "data": [card]},
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/v1/chat/completions"): partial(self._generate, chat=True),
            ("POST", "/v1/completions"): partial(self._generate, chat=False),
            **{("GET", path): lambda *_: self.page.text(self.clock.values(), self.clock.finished)
               for path in self.page.paths},
        }  # fmt: skip

    def serve(self, connection: Connection, method: str, path: str, body: bytes) -> None:
        """Answer one request, or start the call that will."""
        try:
            route = self.routes.get((method, path))
            if route is None:
                raise RefusedError(404, f"no {method} {path} here")
            fields = json.loads(body) if body else {}
            reply = route(connection, fields)
            if reply is not None:
                connection.reply(200, reply)
        except RefusedError as refused:
            _fail(connection, *refused.args)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            _fail(connection, 400, f"{type(error).__name__}: {error}")

    def _tokenize(self, _: Connection, body: Body) -> Body:
        ids = token_ids(self._prompt(body, "messages" in body))
        return {"count": len(ids), "max_model_len": self.clock.scheduler.config.max_model_len, "tokens": ids}

    def _prompt(self, body: Body, chat: bool) -> bytes:
        if chat:
            return chat_text(body["messages"], body.get("tools"))
        prompt = body["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        return prompt.encode(errors="replace") if isinstance(prompt, str) else np.array(prompt, "<u4").tobytes()

    def _generate(self, connection: Connection, body: Body, chat: bool) -> None:
        name, limits = body.get("model"), self.clock.scheduler.config
        if name not in (None, self.machine.model_name):
            raise RefusedError(404, f"the model {name!r} does not exist; this server has {self.machine.model_name!r}")
        if body.get("n", 1) != 1:
            raise ValueError("n: one choice per request is emulated")
        prompt = self._prompt(body, chat)
        extra = -len(prompt) % TOKEN_BYTES
        input_len = (len(prompt) + extra) // TOKEN_BYTES
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        room = limits.max_model_len - input_len
        if room < (asked or 1):
            raise RefusedError(400, f"the context of {limits.max_model_len} tokens is exceeded: {input_len} tokens of prompt "
                               f"and {asked or 1} of answer")  # fmt: skip
        answer, output_len, finish = _plan(body, crc32(prompt), asked or room, extra)
        said = answer.encode() if isinstance(answer, str) else b""
        self.tree.forget(self.clock.scheduler.pool)
        call = Generation(next(self.keys), input_len, output_len, self.tree.path(prompt + said))
        if refusal := self.clock.submit(call):
            self.clock.counts["refused"] += 1
            raise RefusedError(503 if refusal.startswith("queue") else 400, refusal)
        call.begin(self, connection, body, answer, finish, extra)


def _plan(body: Body, seed: int, limit: int, extra: int) -> tuple[Answer, int, str]:
    """The answer, its tokens and why it ends."""
    if limit < 1:
        raise ValueError(f"max_tokens must be at least 1, got {limit}")
    answer = scripted(body, seed)
    if isinstance(answer, list):
        tokens = sum(1 for _ in _parts(answer, 0))
        if tokens <= limit:
            return answer, tokens, "tool_calls"
        answer = None
    if answer is None:
        low, high = NATURAL_TOKENS
        natural = max(body.get("min_tokens") or 0, low + seed % (high - low + 1))
        tokens = limit if body.get("ignore_eos") else min(limit, natural)
        answer = words(tokens + 1, seed)
        return answer[: tokens * TOKEN_BYTES + extra], tokens, "length" if tokens == limit else "stop"
    tokens = max(1, ceil((len(answer) - extra) / TOKEN_BYTES))
    cut = answer[: limit * TOKEN_BYTES + extra]
    return cut, min(tokens, limit), "length" if tokens > limit else "stop"


def _fail(connection: Connection, status: int, message: str) -> None:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "ServiceUnavailableError")
    connection.reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})
