"""The OpenAI-compatible face: a small HTTP/1.1 server that writes a step's tokens without detours."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from itertools import count
from typing import Any
from zlib import crc32

import httptools
import numpy as np

from kit.emulator.clock import Clock, Paced
from kit.emulator.hidden import hide, truth
from kit.emulator.page import Page
from kit.emulator.text import TOKEN_BYTES, PrefixTree, prompt_bytes, scripted, words
from kit.engine_config import ResolvedConfig
from kit.errors import UserError
from kit.scheduler import Request, SchedulerConfig, StepTime

Body = dict[str, Any]
Answer = str | list[Body]  # text, or tool calls
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
OPEN = b"null}]}\n\n"  # how an event ends that is not the last
NATURAL_TOKENS = 32, 256  # shortest and longest answer that is not told how long to be
BACKLOG = 16_384
GRACE_S = 2.0  # for answers under way when the server is told to stop


class RefusedError(Exception):
    """An answer other than 200: status and message."""


class Connection(asyncio.Protocol):
    """One client: its requests one after another, and the call that is being answered."""

    def __init__(self, api: "Api") -> None:
        self.api, self.keep = api, True
        self.call: Generation | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser: Any = httptools.HttpRequestParser(self)
        self.fd = -1 if os.name == "nt" else transport.get_extra_info("socket").fileno()
        self.api.connections.add(self)
        self.api.clock.poll()

    def connection_lost(self, exc: Exception | None) -> None:
        self.api.connections.discard(self)
        self.parser = None  # it refers back to this object
        if self.call is not None:
            self.api.clock.cancel(self.call.request)
            self.call = None
            self.api.clock.poll()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.reply(400, f"not HTTP: {error}")
            self.transport.close()
        self.api.clock.poll()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", bytearray()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.keep, method = self.parser.should_keep_alive(), self.parser.get_method().decode()
        if self.call is None:
            self.api.serve(self, method, self.url.partition(b"?")[0].decode(), self.body)
        else:
            self.transport.abort()  # pipelining, which nobody does

    def write(self, data: bytes) -> None:
        """Send at once: the loop's own writes leave only after all callbacks that are ready."""
        if self.fd >= 0 and not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            with contextlib.suppress(BlockingIOError, ConnectionError):  # the loop sees a lost one too
                data = data[os.write(self.fd, data) :]
        if data:
            self.transport.write(data)

    def done(self) -> None:
        """An answer is complete."""
        self.call = None
        if not self.keep:
            self.transport.close()

    def reply(self, status: int, payload: Body | str) -> None:
        """A whole answer, JSON or plain text; or OpenAI's error with that message."""
        phrase, kind = HTTPStatus(status).phrase, "application/json"
        if status != 200:
            error = {"message": payload, "type": phrase.replace(" ", "") + "Error", "param": None, "code": status}
            payload = {"error": error}
        elif isinstance(payload, str):
            kind = "text/plain; version=0.0.4"
        body = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body)
        self.done()


class Generation:
    """One call: what its client gets, token by token or at once."""

    def __init__(self, connection: Connection, request: Request, body: Body, answer: Answer, finish: str) -> None:
        self.connection, self.request, self.answer, self.finish = connection, request, answer, finish
        self.chat, self.stream = "messages" in body, bool(body.get("stream"))
        self.usage = (body.get("stream_options") or {}).get("include_usage")
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.head: Body = {"id": f"{prefix}-{request.key}", "object": kind + ".chunk" * (self.chat and self.stream)}
        self.head |= {"created": int(time.time()), "model": connection.api.model_name}
        self.head["system_fingerprint"] = "emulated"
        self.events = events(self.head, answer, self.chat)

    def token(self, last: bool) -> None:
        """Write the token's event; with the last one all that ends an answer."""
        if self.stream:
            data = next(self.events)
            if last:
                usage = json.dumps({**self.head, "choices": [], "usage": self._counts()}).encode()
                data = data[: -len(OPEN)] + b'"%b"}]}\n\n' % self.finish.encode()
                data += (b"data: %b\n\n" % usage if self.usage else b"") + b"data: [DONE]\n\n"
            self.connection.write(b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b""))
        if last:
            self.connection.api.clock.counts["length" if self.finish == "length" else "stop"] += 1
            self.connection.done() if self.stream else self.connection.reply(200, self._whole())

    def _whole(self) -> Body:
        calls = {"content": None, "tool_calls": self.answer} if isinstance(self.answer, list) else {}
        message = {"role": "assistant", "content": self.answer, **calls}
        choice: Body = {"index": 0, "logprobs": None, "finish_reason": self.finish}
        choice |= {"message": message} if self.chat else {"text": self.answer}
        return {**self.head, "choices": [choice], "usage": self._counts()}

    def _counts(self) -> Body:
        given, made = self.request.input_len, self.request.output_len
        counts = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return {**counts, "prompt_tokens_details": {"cached_tokens": max(0, self.request.hit_tokens)}}


def events(head: Body, answer: Answer, chat: bool) -> Iterator[bytes]:
    """Server-sent events, one per token; the first of a chat also names the role."""
    start, field = json.dumps({**head, "choices": []}).encode()[:-2], b"delta" if chat else b"text"
    frame = b'data: %b{"index": 0, "%b": %%b, "finish_reason": %b' % (start, field, OPEN)
    opening = frame % b'{"role": "assistant", "content": ""}' if chat else b""
    for part in parts(answer):
        shown = {"content": part} if chat and isinstance(part, str) else part
        yield opening + frame % json.dumps(shown).encode()
        opening = b""


def parts(answer: Answer) -> Iterator[str | Body]:
    """What each token of an answer shows: a bit of text, or of a tool call."""
    if isinstance(answer, str):
        yield from (answer[at : at + TOKEN_BYTES] for at in range(0, len(answer), TOKEN_BYTES))
        return
    for index, call in enumerate(answer):
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for part in parts(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


class Api:
    """Requests in, calls to the clock, answers out."""

    def __init__(
        self, model_name: str, config: ResolvedConfig, limits: SchedulerConfig, step_time: StepTime,
        seed: int | None = None, pace_s: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        hidden = None if seed is None else truth(seed)
        if hidden:
            limits, step_time = hide(hidden, limits, step_time)
        self.model_name, page = model_name, Page(config, model_name)
        given = limits, step_time, page, asyncio.get_running_loop(), hidden, seed or 0
        self.clock = Paced(pace_s, *given) if pace_s else Clock(*given)
        self.limits, self.keys = limits, count(1)
        self.tree = None if pace_s else PrefixTree(limits.block_size)
        self.connections = set[Connection]()
        card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "emulator"}
        card |= {"root": model_name, "max_model_len": limits.max_model_len, "emulated": True}
        self.routes: dict[tuple[str, str], Callable[[Connection, Body], Body | str | None]] = {
            ("GET", "/health"): lambda *_: "",
            ("GET", "/v1/models"): lambda *_: {"object": "list", "data": [card]},
            ("GET", "/metrics"): lambda *_: page.text(self.clock.values(), limits.block_size),
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
        }
        self.routes["GET", page.path or "/metrics"] = self.routes["GET", "/metrics"]

    def serve(self, connection: Connection, method: str, path: str, body: bytes | bytearray) -> None:
        """Answer one request, or start the call that will."""
        try:
            if (method, path) not in self.routes:
                raise RefusedError(404, f"no {method} {path} here")
            reply = self.routes[method, path](connection, json.loads(body) if body else {})
            if reply is not None:
                connection.reply(200, reply)
        except RefusedError as refused:
            connection.reply(*refused.args)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            connection.reply(400, f"{type(error).__name__}: {error}")

    def _tokenize(self, _: Connection, body: Body) -> Body:
        ids = np.frombuffer(prompt_bytes(body), "<u4") % 128_000
        return {"count": len(ids), "max_model_len": self.limits.max_model_len, "tokens": ids.tolist()}

    def _generate(self, connection: Connection, body: Body) -> None:
        if body.get("model", self.model_name) != self.model_name:
            raise RefusedError(404, f"no model {body['model']!r} here, only {self.model_name!r}")
        if body.get("n", 1) != 1:
            raise ValueError("n: one choice per request is emulated")
        prompt = prompt_bytes(body)
        input_len, asked = len(prompt) // TOKEN_BYTES, body.get("max_completion_tokens", body.get("max_tokens"))
        room = self.limits.max_model_len - input_len
        if room < (asked or 1):
            over = f"{input_len} tokens of prompt and {asked or 1} of answer"
            raise RefusedError(400, f"{over} exceed the maximum context length of {self.limits.max_model_len} tokens")
        answer, output_len, finish = plan(body, crc32(prompt), room if asked is None else asked)
        known = prompt + answer.encode() if isinstance(answer, str) else prompt
        path = self.tree.path(known) if self.tree else ()
        request = Request(next(self.keys), input_len, output_len, path)
        if refusal := self.clock.submit(request):
            self.clock.counts["refused"] += 1
            raise RefusedError(503 if refusal.startswith("queue") else 400, refusal)
        connection.call = request.owner = Generation(connection, request, body, answer, finish)
        if connection.call.stream:
            connection.write(STREAM_HEAD)


def plan(body: Body, seed: int, limit: int) -> tuple[Answer, int, str]:
    """The answer, its tokens and why it ends."""
    if limit < 1:
        raise ValueError(f"max_tokens must be at least 1, got {limit}")
    answer = scripted(body, seed)
    tokens = sum(1 for _ in parts(answer or ""))
    if isinstance(answer, str):
        return answer[: limit * TOKEN_BYTES], min(tokens, limit), "stop" if tokens <= limit else "length"
    if answer is not None and tokens <= limit:
        return answer, tokens, "tool_calls"
    low, high = NATURAL_TOKENS
    natural = max(body.get("min_tokens") or 0, low + seed % (high - low + 1))
    tokens = limit if body.get("ignore_eos") else min(limit, natural)
    return words(tokens, seed), tokens, "length" if tokens == limit else "stop"


async def listen(make: Callable[[], Api], host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve what `make` makes until SIGINT or SIGTERM; `ready` is told the URL once connections are taken."""
    loop, stop, api = asyncio.get_running_loop(), asyncio.Event(), make()
    try:
        server = await loop.create_server(partial(Connection, api), host, port, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows, or not the main thread
            loop.add_signal_handler(number, stop.set)
    gc.freeze()
    gc.disable()  # a collection stops the clock, and nothing here is left to one
    ready(f"http://{host}:{server.sockets[0].getsockname()[1]}")
    await stop.wait()
    server.close()
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until and any(one.call for one in api.connections):
        await asyncio.sleep(0.02)
    for connection in list(api.connections):
        connection.transport.abort()
