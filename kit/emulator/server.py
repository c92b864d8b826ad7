"""The OpenAI-compatible face: a small HTTP/1.1 server that writes a step's tokens without detours."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from itertools import count
from time import monotonic
from typing import Any
from zlib import crc32

import httptools
import numpy as np

from kit.emulator.clock import Clock, Paced
from kit.emulator.text import TOKEN_BYTES, Answer, Body, PrefixTree, parts, plan, prompt_bytes
from kit.errors import UserError
from kit.scheduler import Request

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = "0\r\n\r\n"
TEXT = "text/plain; version=0.0.4"
BACKLOG = 16_384
SLICE_S = 0.001  # of work on requests that have arrived, before the loop looks for more
GRACE_S = 2.0  # for answers under way when the server is told to stop


class RefusedError(Exception):
    """An answer other than 200: status and message."""


class Connection(asyncio.Protocol):
    """One client: its requests one after another, and the call that is being answered."""

    def __init__(self, api: "Api") -> None:
        self.api, self.keep, self.asked = api, True, False
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
        self.keep, path = self.parser.should_keep_alive(), self.url.partition(b"?")[0]
        if self.call is None and not self.asked:
            self.api.arrived(self, f"{self.parser.get_method().decode()} {path.decode()}", self.body)
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
        phrase = HTTPStatus(status).phrase
        if status != 200:
            error = {"message": payload, "type": phrase.replace(" ", "") + "Error", "param": None, "code": status}
            payload = {"error": error}
        kind, text = (TEXT, payload) if isinstance(payload, str) else ("application/json", json.dumps(payload))
        body = text.encode()
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body)
        self.done()


class Generation:
    """One call: what its client gets, token by token or at once."""

    def __init__(self, connection: Connection, request: Request, body: Body, answer: Answer, finish: str) -> None:
        self.connection, self.request, self.answer, self.finish = connection, request, answer, finish
        self.chat, self.stream = "messages" in body, bool(body.get("stream"))
        self.with_usage = (body.get("stream_options") or {}).get("include_usage")
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.head: Body = {"id": f"{prefix}-{request.key}", "object": kind + ".chunk" * (self.chat and self.stream)}
        self.head |= {"created": int(time.time()), "model": connection.api.model_name}
        self.head["system_fingerprint"] = "emulated"
        choice = {"index": 0, "delta" if self.chat else "text": None, "finish_reason": None}
        self.frame = json.dumps({**self.head, "choices": [choice]}).rsplit("null", 2)
        self.parts, self.opening = parts(answer), self._event({"role": "assistant", "content": ""}) if self.chat else ""

    def _event(self, shown: Any, finish: str = "null") -> str:
        start, between, end = self.frame
        return f"data: {start}{json.dumps(shown)}{between}{finish}{end}\n\n"

    def token(self, last: bool) -> None:
        """Write the token's event, the first one after the role; with the last one all that ends an answer."""
        if self.stream:
            part, finish = next(self.parts), f'"{self.finish}"' if last else "null"
            data = self.opening + self._event(part if self.chat else part.get("content", ""), finish)
            self.opening = ""
            if last:
                usage = json.dumps({**self.head, "choices": [], "usage": self._usage()})
                data += (f"data: {usage}\n\n" if self.with_usage else "") + "data: [DONE]\n\n"
            self.connection.write(f"{len(data):x}\r\n{data}\r\n{LAST_CHUNK * last}".encode())
        if last:
            self.connection.api.clock.counts["length" if self.finish == "length" else "stop"] += 1
            self.connection.done() if self.stream else self.connection.reply(200, self._whole())

    def _whole(self) -> Body:
        calls = {"content": None, "tool_calls": self.answer} if isinstance(self.answer, list) else {}
        message = {"role": "assistant", "content": self.answer, **calls}
        shown = {"message": message} if self.chat else {"text": self.answer}
        choice = {"index": 0, "logprobs": None, "finish_reason": self.finish, **shown}
        return {**self.head, "choices": [choice], "usage": self._usage()}

    def _usage(self) -> Body:
        given, made = self.request.input_len, self.request.output_len
        counts = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return {**counts, "prompt_tokens_details": {"cached_tokens": max(0, self.request.hit_tokens)}}


class Api:
    """Requests in, calls to the clock, answers out."""

    connection = Connection

    def __init__(self, model_name: str, clock: Clock) -> None:
        self.model_name, self.clock, self.limits = model_name, clock, clock.scheduler.config
        self.tree, self.keys = PrefixTree(self.limits.block_size), count(1)
        self.asked = deque[tuple[Connection, str, bytearray, float]]()
        self.connections = set[Connection]()
        card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "emulator"}
        card |= {"root": model_name, "max_model_len": self.limits.max_model_len, "emulated": True}
        self.routes: dict[str, Callable[[Connection, Body, float], Body | str | None]] = {
            "GET /health": lambda *_: "",
            "GET /v1/models": lambda *_: {"object": "list", "data": [card]},
            "GET /server_info": lambda *_: {"emulated": True, "max_num_seqs": self.limits.max_num_seqs},
            **dict.fromkeys(("GET /metrics", f"GET {clock.page.path}"), lambda *_: clock.page.text(clock.values())),
            "POST /tokenize": self._tokenize,
            **dict.fromkeys(("POST /v1/chat/completions", "POST /v1/completions"), self._generate),
        }

    def arrived(self, connection: Connection, route: str, body: bytearray) -> None:
        """Stamp a request: reading it, which takes longer, must not keep those behind it waiting for theirs."""
        if not self.asked:
            self.clock.loop.call_soon(self._take)
        connection.asked = True
        self.asked.append((connection, route, body, monotonic()))

    def _take(self) -> None:
        """Serve what has arrived, and between slices let more arrive."""
        until = monotonic() + SLICE_S
        while self.asked and monotonic() < until:
            connection, route, body, arrival = self.asked.popleft()
            connection.asked = False
            if connection in self.connections:
                self.serve(connection, route, body, arrival)
            self.clock.poll()
        if self.asked:
            self.clock.loop.call_soon(self._take)

    def serve(self, connection: Connection, route: str, body: bytearray, arrival: float) -> None:
        """Answer one request, or start the call that will."""
        try:
            if route not in self.routes:
                raise RefusedError(404, f"no {route} here")
            if (reply := self.routes[route](connection, json.loads(body or b"{}"), arrival)) is not None:
                connection.reply(200, reply)
        except RefusedError as refused:
            connection.reply(*refused.args)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            connection.reply(400, f"{type(error).__name__}: {error}")

    def _tokenize(self, _: Connection, body: Body, __: float) -> Body:
        ids = np.frombuffer(prompt_bytes(body), "<u4") % 128_000
        return {"count": len(ids), "max_model_len": self.limits.max_model_len, "tokens": ids.tolist()}

    def _generate(self, connection: Connection, body: Body, arrival: float) -> None:
        if body.get("model", self.model_name) != self.model_name:
            raise RefusedError(404, f"no model {body['model']!r} here, only {self.model_name!r}")
        if body.get("n", 1) != 1:
            raise ValueError("n: one choice per request is emulated")
        prompt, asked = prompt_bytes(body), body.get("max_completion_tokens", body.get("max_tokens"))
        input_len, most = len(prompt) // TOKEN_BYTES, self.limits.max_model_len
        if input_len + (asked or 1) > most:
            over = f"{input_len} tokens of prompt and {asked or 1} of answer"
            raise RefusedError(400, f"{over} exceed the maximum context length of {most} tokens")
        answer, output_len, finish = plan(body, crc32(prompt), most - input_len if asked is None else asked)
        known = prompt + answer.encode() if isinstance(answer, str) else prompt
        path = () if isinstance(self.clock, Paced) else self.tree.path(known)
        request = Request(next(self.keys), input_len, output_len, path)
        if refusal := self.clock.submit(request, arrival):
            self.clock.counts["refused"] += 1
            raise RefusedError(503 if refusal.startswith("queue") else 400, refusal)
        connection.call = request.owner = Generation(connection, request, body, answer, finish)
        if connection.call.stream:
            connection.write(STREAM_HEAD)


async def listen(make: Callable[[], Any], host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve what `make` makes until SIGINT or SIGTERM; `ready` is told the URL once connections are taken."""
    loop, stop, api = asyncio.get_running_loop(), asyncio.Event(), make()
    try:
        server = await loop.create_server(partial(api.connection, api), host, port, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from None
    failed: list[Any] = []

    def give_up(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        if "protocol" not in context:  # not one client's: without its clock a server would only keep them waiting
            failed.append(context["message"])
            stop.set()

    loop.set_exception_handler(give_up)
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows, or not the main thread
            loop.add_signal_handler(number, stop.set)
    gc.freeze()
    gc.disable()  # a collection stops the clock, and nothing here is left to one
    ready(f"http://{host}:{server.sockets[0].getsockname()[1]}")
    await stop.wait()
    server.close()
    until = monotonic() + GRACE_S
    while monotonic() < until and any(one.call for one in api.connections):
        await asyncio.sleep(0.02)
    if failed:
        raise RuntimeError(f"the emulator's clock failed: {failed[0]}")
