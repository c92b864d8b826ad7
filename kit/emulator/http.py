"""A small HTTP/1.1 server that writes a step's tokens without detours."""

import asyncio
import contextlib
import gc
import json
import os
import signal
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import httptools

from kit.errors import UserError

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BACKLOG = 16_384
GRACE_S = 2.0  # for answers under way when the server is told to stop


class Handler(Protocol):
    """What serves the requests of all connections."""

    connections: set["Connection"]

    def serve(self, connection: "Connection", method: str, path: str, body: bytes) -> None: ...
    def between(self) -> None: ...
    def cancel(self, call: Any) -> None: ...


class Connection(asyncio.Protocol):
    """One client: its requests one after another, and the call that is being answered."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.queue = handler, deque[tuple[str, str, bytes, bool]]()
        self.call: Any = None
        self.keep = True
        self.transport: Any = None
        self.parser: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.parser = transport, httptools.HttpRequestParser(self)
        self.fd = -1 if os.name == "nt" else transport.get_extra_info("socket").fileno()
        self.handler.connections.add(self)
        self.handler.between()

    def connection_lost(self, exc: Exception | None) -> None:
        self.handler.connections.discard(self)
        self.parser = None  # it refers back to this object
        self.queue.clear()
        if self.call is not None:
            self.handler.cancel(self.call)
            self.call = None

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.reply(400, {"error": {"message": f"not HTTP: {error}", "code": 400}})
            self.transport.close()
        self.handler.between()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", bytearray()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path, keep = self.url.partition(b"?")[0].decode(errors="replace"), self.parser.should_keep_alive()
        self.queue.append((self.parser.get_method().decode(), path, bytes(self.body), keep))
        self.next()

    def next(self) -> None:
        """Serve what is queued, up to a call that takes its time."""
        while self.queue and self.call is None and self.keep:
            method, path, body, self.keep = self.queue.popleft()
            self.handler.serve(self, method, path, body)
            if not self.keep and self.call is None:
                self.transport.close()

    def done(self) -> None:
        """The call is answered."""
        self.call = None
        if not self.keep:
            self.transport.close()
        self.next()

    def write(self, data: bytes) -> None:
        """Send at once: the loop's own writes leave only after all callbacks that are ready."""
        if self.transport.is_closing():
            return
        if self.fd >= 0 and not self.transport.get_write_buffer_size():
            with contextlib.suppress(BlockingIOError, ConnectionError):  # the loop sees a lost one too
                data = data[os.write(self.fd, data) :]
        if data:
            self.transport.write(data)

    def reply(self, status: int, payload: dict[str, Any] | str) -> None:
        """A whole answer, JSON or plain text."""
        body = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        kind = "text/plain; version=0.0.4" if isinstance(payload, str) else "application/json"
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body)


async def listen(handler: Handler, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the URL once connections are taken."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    try:
        server = await loop.create_server(lambda: Connection(handler), host, port, backlog=BACKLOG)
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
    until = monotonic() + GRACE_S
    while monotonic() < until and any(one.call is not None for one in handler.connections):
        await asyncio.sleep(0.02)
    for connection in list(handler.connections):
        connection.transport.abort()
