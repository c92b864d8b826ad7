"""Bytes from the client to the upstream and back, chunk by chunk, and a row for each model call."""

import asyncio
import errno
import json
import os
import re
import ssl
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from kit.emulator.server import Connection
from kit.errors import UserError
from kit.loadgen.plan import Target
from kit.loadgen.stream import StreamParser
from kit.record.calls import Asked
from kit.record.sessions import Sessions

MODEL_CALLS = b"/chat/completions", b"/completions"
OWN = {b"connection", b"keep-alive", b"host", b"content-length", b"transfer-encoding", b"accept-encoding", b"expect"}
ASK_USAGE = b'{"stream_options":{"include_usage":true},'
STREAMS, OPTIONS = re.compile(rb'"stream"\s*:\s*true'), re.compile(rb'"stream_options"')
# The event that tells usage alone, which a client that did not ask for it shall not see.
USAGE_EVENT = re.compile(rb'data: ?\{(?=[^\n]*"choices": ?\[\])(?=[^\n]*"usage": ?\{)[^\n]*\n\r?\n')
EVENT_END = re.compile(rb"\n\r?\n")
CONNECT_TIMEOUT_S = 10.0


def upstream(url: str) -> Target:
    """The server behind the proxy; UserError where nothing answers there."""
    import socket

    try:
        target = Target(url, "")
        socket.create_connection(target.address, CONNECT_TIMEOUT_S).close()
    except UserError:
        raise UserError(f"--upstream {url!r}: want http://HOST:PORT or https://HOST") from None
    except OSError as error:
        raise UserError(f"--upstream {url}: cannot be reached ({error.strerror or error})") from None
    return target


class Client(Connection):
    """One connection of an agent, with the headers of its request; what is asked on it, the Recorder answers."""

    call: "Answer | None"  # type: ignore[assignment]

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.began_s, self.headers = monotonic(), list[tuple[bytes, bytes]]()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


class Upstream(asyncio.Protocol):
    """One connection to the server, used again."""

    def __init__(self, recorder: "Recorder") -> None:
        self.recorder, self.used = recorder, 0
        self.answer: Answer | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if answer is not None:
            answer.feed(data, monotonic())
        if answer is None or answer.reason == "garbage":
            self.transport.abort()
        elif answer.complete:
            self.answer = None
            self.recorder.idle.append(self) if answer.keep else self.transport.close()
            answer.over()

    def connection_lost(self, exc: Exception | None) -> None:
        with suppress(ValueError):
            self.recorder.idle.remove(self)
        if self.answer is not None:
            self.answer.lost(retry=self.used > 1)

    def send(self, answer: "Answer") -> None:
        """Put the request of an answer on the wire."""
        self.answer, answer.connection = answer, self
        self.used += 1
        self.transport.write(answer.data)


class Answer(StreamParser):
    """One request and its answer on the way back: passed on first, looked at second."""

    def __init__(self, client: Client, body: bytes, recorder: "Recorder") -> None:
        super().__init__(keep_text=recorder.content)
        self.client, self.recorder, self.began_s = client, recorder, client.began_s
        self.connection: Upstream | None = None
        self.is_call = client.url.partition(b"?")[0].endswith(MODEL_CALLS)
        self.whole, self.held, self.lines, self.phrase = b"", b"", list[bytes](), b""
        self.hides = self.is_call and bool(STREAMS.search(body)) and not OPTIONS.search(body)
        self.request = self  # what its client's connection cancels
        self.data = self._as_sent(body.replace(b"{", ASK_USAGE, 1) if self.hides else body)
        self.keep = self.framed = False
        client.call = self
        recorder.forward(self)
        self.asked = Asked(body, client.headers, recorder.sessions) if self.is_call else None

    def _as_sent(self, body: bytes) -> bytes:
        client, host = self.client, self.recorder.host
        lines = [client.parser.get_method() + b" " + self.recorder.root + client.url + b" HTTP/1.1", b"host: " + host]
        lines += [name + b": " + value for name, value in client.headers if name not in OWN]
        return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])

    def on_status(self, status: bytes) -> None:
        self.phrase = status

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        kept = name.lower() not in OWN or (name.lower() == b"content-length" and not self.hides)
        self.framed |= kept and name.lower() == b"content-length"
        self.lines += [name + b": " + value] * kept

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.keep = self._http.should_keep_alive()
        lines = self.lines + [b"transfer-encoding: chunked"] * (not self.framed)
        head = b"HTTP/1.1 %d %s" % (self._http.get_status_code(), self.phrase)
        self.client.write(b"\r\n".join([head, *lines, b"", b""]))

    def on_body(self, body: bytes) -> None:
        self._pass_on(body)
        if self.is_call and not self._is_events:
            self.whole += body
        super().on_body(body)

    def _pass_on(self, body: bytes, end: bool = False) -> None:
        if self.hides:
            self.held += body
            ends = (found.end() for found in EVENT_END.finditer(self.held))
            cut = len(self.held) if end else max(ends, default=0)
            body, self.held = USAGE_EVENT.sub(b"", self.held[:cut]), self.held[cut:]
        if body:
            self.client.write(body if self.framed else b"%x\r\n%b\r\n" % (len(body), body))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._pass_on(b"", end=True)
        if not self.framed:
            self.client.write(b"0\r\n\r\n")
        if self.whole and self.status == 200:
            with suppress(ValueError, LookupError, TypeError, AttributeError):
                told = json.loads(self.whole)
                self.usage, choice = told["usage"], told["choices"][0]
                self.finish_reason = choice["finish_reason"]
                self.text = [choice["message"]["content"]] if self.recorder.content else None

    def failure(self) -> str | None:
        """Why it is no answer; None for a good one."""
        if self._is_events:
            return self.outcome()
        return self.reason or (None if self.status == 200 else f"http_{self.status}")

    def lost(self, retry: bool = False) -> None:
        """The upstream closed: that ends an answer without length, else the answer is cut off."""
        self.connection = None
        if retry and self.status is None and not self.lines:
            self.recorder.forward(self, new=True)
            return
        self.close()
        if not self.complete:
            self.reason = self.reason or "cut"
            self.client.transport.abort() if self._head_done else self.client.reply(502, "the upstream closed")
        self.over()

    def over(self) -> None:
        """Write the row and let go of everything."""
        self.client.done()
        if self.asked is not None:
            self.recorder.write(self, self.asked)
        del self._http  # it refers back to this object


class Recorder:
    """Sessions and the file, and what a Connection expects of an Api and its clock; `listen` serves it."""

    connection = Client

    def __init__(self, target: Target, out: Path, content: bool = False) -> None:
        self.target, self.content, self.sessions = target, content, Sessions()
        self.clock, self.host = self, "{}:{}".format(*target.address).encode()
        self.root = target.path.removesuffix("/v1/chat/completions").encode()
        self.tls = ssl.create_default_context() if target.tls else None
        self.connections, self.idle = set[Client](), list[Upstream]()
        self.calls, self.tasks, self.began_s = 0, set[asyncio.Task[None]](), monotonic()
        try:
            self.file = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
        self._append({"kit_recording": 1, "started_utc": datetime.now(UTC).isoformat(timespec="seconds")})

    def arrived(self, client: Client, route: str, body: bytearray) -> None:
        """Pass a request on."""
        Answer(client, bytes(body), self)

    def poll(self) -> None:
        """Nothing falls due here."""

    def cancel(self, answer: Answer) -> None:
        """The client is gone: so is the upstream's reason to go on."""
        answer.complete = answer.done  # it has all, and need not wait for the end of the connection
        answer.reason = answer.reason or (None if answer.done else "client_left")
        if answer.connection is not None:
            answer.connection.answer = None
            answer.connection.transport.abort()
        answer.over()

    def forward(self, answer: Answer, new: bool = False) -> None:
        """Send it on a connection that is free, else on a new one."""
        if self.idle and not new:
            self.idle.pop().send(answer)
            return
        task = asyncio.get_running_loop().create_task(self._on_new(answer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _on_new(self, answer: Answer) -> None:
        loop, (host, port) = asyncio.get_running_loop(), self.target.address
        opened = loop.create_connection(lambda: Upstream(self), host, port, ssl=self.tls)
        try:
            _, connection = await asyncio.wait_for(opened, CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            answer.reason = "connect"
            answer.client.reply(502, f"the upstream cannot be reached: {error}")
            answer.over()
            return
        if answer.client.call is answer:
            connection.send(answer)
        else:
            connection.transport.close()  # the client has left meanwhile

    def write(self, answer: Answer, asked: Asked) -> None:
        """Append the row of a call that is over; a full disk stops the recording, never the agents."""
        first = answer.times[0] - self.began_s if answer.times else None
        start_s, end_s = answer.began_s - self.began_s, monotonic() - self.began_s
        told: dict[str, Any] = {"start_s": start_s, "first_token_s": first, "end_s": end_s}
        told |= {"failure": answer.failure(), "finish_reason": answer.finish_reason}
        told |= asked.counted(answer.usage, answer.output_tokens())
        if self.content:
            told |= {"asked": asked.body, "answer": "".join(answer.text or [])}
        self.calls += 1
        try:
            self._append(asked.told | told)
        except OSError as error:
            sys.stderr.write(f"kit record: this call is not recorded: {error.strerror}\n")

    def _append(self, record: dict[str, Any]) -> None:
        data = json.dumps(record).encode() + b"\n"
        before = os.fstat(self.file).st_size
        if os.write(self.file, data) < len(data):
            os.ftruncate(self.file, before)  # no line is ever half there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
