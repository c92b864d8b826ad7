"""Small real servers for the load generator's tests: a thread, an event loop, one handler."""

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


class Server:
    """What the tests read: the address and the requests that came."""

    def __init__(self) -> None:
        self.base_url = ""
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.live = self.peak = 0
        self.metrics = ""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def token(text: str = " tok", finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": [choice]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def prompt_tokens(request: dict[str, Any]) -> int:
    """A tokenizer of one token per word and five per message."""
    messages = request.get("messages") or [{"content": request["prompt"]}]
    return sum(5 + len(message["content"].split()) for message in messages)


def paced(ttft_s: float, itl_s: float, output_len: int | None = None) -> Handler:
    """Tokens on an absolute schedule from the request's arrival."""

    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + ttft_s
        n = output_len or request["max_tokens"]
        writer.write(HEAD)
        for index in range(n):
            await asyncio.sleep(max(0.0, due + index * itl_s - loop.time()))
            writer.write(chunk(event(token(finish="length" if index == n - 1 else None))))
        writer.write(chunk(event(usage(prompt_tokens(request), n))) + chunk(event(b"[DONE]")))
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return answer


def status(code: int, body: bytes = b'{"error":{"message":"busy"}}') -> Handler:
    async def answer(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (code, len(body), body))
        await writer.drain()

    return answer


@contextlib.contextmanager
def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """The handler behind a port of 127.0.0.1, until the block ends."""
    server, loop = Server(), asyncio.new_event_loop()
    ready = threading.Event()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if head.startswith("GET"):
                    page = server.metrics.encode()
                    size = len(page)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (size, page))
                    continue
                length = int(head.lower().split("content-length:")[1].split()[0])
                request = json.loads(await reader.readexactly(length))
                server.requests.append(request)
                server.heads.append(head)
                server.live += 1
                server.peak = max(server.peak, server.live)
                try:
                    await handler(request, writer)
                finally:
                    server.live -= 1
        writer.close()

    async def main() -> None:
        listener = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=4096, ssl=tls, limit=1 << 22)
        scheme = "https" if tls else "http"
        server.base_url = f"{scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        async with listener:
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
