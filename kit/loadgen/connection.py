"""Connections that stamp each read with the time at which the kernel received the bytes.

On plain TCP under Linux the stamp is the kernel's own (SO_TIMESTAMPNS), so a client that reads late
still tells the right time, and the difference to the read is this client's exact lag. With TLS, or
where the kernel gives no stamp, the time of the read is used and that lag is unknown.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from array import array
from functools import cached_property
from random import randrange
from time import monotonic, time
from typing import TYPE_CHECKING

from kit.loadgen.plan import Target
from kit.loadgen.prompts import Conversation
from kit.loadgen.stream import StreamParser

if TYPE_CHECKING:
    from kit.loadgen.driver import Driver

SO_TIMESTAMPNS = 35  # Linux; the socket module has no name for it
READ_BYTES = 1 << 15
ANCILLARY_BYTES = socket.CMSG_SPACE(16)
STAMP = struct.Struct("qq")
STEP_S = 1e-3  # a stamp that lies further before what came before it is of another setting of the wall clock
# A chunked 200 without trailers ends like this after the last event; other answers are parsed
# read by read to find their end.
CHUNKED = re.compile(
    rb"HTTP/1\.1 200 [^\r]*\r\n(?:(?!trailer:)[^\r\n]+\r\n)*?transfer-encoding: *chunked\r\n", re.IGNORECASE
)
LAST_CHUNK = b"0\r\n\r\n"
STREAM_END = b"\n\r\n0\r\n\r\n"
SHORT = len(STREAM_END)
# Reads kept before a long answer is parsed while it runs; spread, so that streams which started
# together are not parsed together.
READS_KEPT, READS_SPREAD = 96, 64


class Call:
    """One request on the wire: its raw reads with arrival times, parsed when there is time."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation, self.turn = conversation, conversation.turn
        self.asked = conversation.session.turns[self.turn]
        self.scheduled = self.due = self.sent = self.end = self.connect_s = float("nan")  # due: held by no cap
        self.data = b""
        self.reason: str | None = None
        self.retried = False
        self.keep = READS_KEPT + randrange(READS_SPREAD)
        self.reads: list[bytes] = []
        self.arrivals = array("d")
        self.eager = True

    @cached_property
    def parser(self) -> StreamParser:
        """Made at the first parse: until then a call is cheap."""
        return StreamParser(keep_text=not self.conversation.last)

    @property
    def answered(self) -> bool:
        """Whether any byte came back."""
        return bool(self.reads) or "parser" in vars(self)

    def parse(self, limit: int | None = None) -> bool:
        """Feed waiting reads to the parser; true when none is left."""
        taken = len(self.reads) if limit is None else min(limit, len(self.reads))
        feed = self.parser.feed
        for data, arrival in zip(self.reads[:taken], self.arrivals[:taken], strict=True):
            feed(data, arrival)
        del self.reads[:taken], self.arrivals[:taken]
        return not self.reads


class Connection:
    """One socket with at most one call on it."""

    def __init__(self, owner: "Driver", loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self.owner, self.loop, self.sock, self.recvmsg = owner, loop, sock, sock.recvmsg
        self.call: Call | None = None
        self.used = 0
        self.open = True
        self.connect_s = 0.0
        self.transport: asyncio.Transport | None = None
        self._unsent = b""

    def send(self, call: Call) -> None:
        """Put the request on the wire; the send time is taken just before."""
        self.call = call
        self.used += 1
        call.sent = monotonic()
        if self.transport is not None:
            self.transport.write(call.data)
            return
        self._unsent = call.data
        self._write()
        if self._unsent:
            self.loop.add_writer(self.sock, self._write_rest)

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # reading will meet it too, after an answer that may have come before
            self._unsent = b""

    def _write_rest(self) -> None:
        self._write()
        if not self._unsent:
            self.loop.remove_writer(self.sock)

    def readable(self) -> None:
        """Read once from a plain socket and stamp it."""
        try:
            data, ancillary, _, _ = self.recvmsg(READ_BYTES, ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.lose()
            return
        arrival = now = monotonic()
        if ancillary:
            seconds, nanoseconds = STAMP.unpack(ancillary[0][2])
            stamp = min(now, seconds + nanoseconds * 1e-9 - self.owner.wall_offset)
            call = self.call
            if call is None or stamp > (call.arrivals[-1] if call.arrivals else call.sent) - STEP_S:
                arrival = stamp  # else the wall clock was set meanwhile, and its stamp says nothing
                self.owner.read_lags.append(now - arrival)
        self.received(data, arrival)

    def received(self, data: bytes, arrival: float) -> None:
        """Keep the bytes; look no further than needed to notice the end of the answer."""
        call = self.call
        if call is None or not data:
            self.lose()
            return
        call.reads.append(data)
        call.arrivals.append(arrival)
        if call.eager or len(data) < SHORT or data.endswith(LAST_CHUNK):
            self._look_for_end(call, data, arrival)
        elif len(call.reads) > call.keep:
            call.parse()

    def _look_for_end(self, call: Call, data: bytes, arrival: float) -> None:
        ended = False
        if call.eager:
            call.eager = not CHUNKED.match(data)
        if not call.eager:
            tail = data if len(data) >= SHORT else b"".join(call.reads[-SHORT:])
            ended = tail.endswith(STREAM_END)
            call.eager = not ended and tail.endswith(LAST_CHUNK)
        if call.eager:
            call.parse()
            ended = call.parser.complete
        if ended:
            self.call = None
            self.owner.ended(self, call, arrival)
        elif call.eager and call.parser.reason == "garbage":
            self.lose()

    def lose(self) -> None:
        """The connection is gone, or not fit for another request."""
        if self.open:
            self.close()
            call, self.call = self.call, None
            if call is not None:
                self.owner.lost(self, call)

    def close(self) -> None:
        """Close the socket without telling the owner."""
        self.open = False
        if self.transport is not None:
            self.transport.abort()
            return
        self.loop.remove_reader(self.sock)
        self.loop.remove_writer(self.sock)
        self.sock.close()


class _TlsBytes(asyncio.Protocol):
    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def data_received(self, data: bytes) -> None:
        self.connection.received(data, monotonic())

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.lose()


class Connector:
    """Opens connections to one target, its name resolved and its TLS context made once."""

    def __init__(self, target: Target, owner: "Driver", loop: asyncio.AbstractEventLoop) -> None:
        self.owner, self.loop = owner, loop
        self.host, port = target.address
        found = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)[0]
        self.family, self.address = found[0], found[4]
        self.tls = ssl.create_default_context() if target.tls else None

    async def open(self) -> Connection:
        """A connection ready to send; its `connect_s` covers TCP and TLS. Raises OSError."""
        started = monotonic()
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.sock_connect(sock, self.address)
            connection = Connection(self.owner, self.loop, sock)
            if self.tls is not None:
                connection.transport, _ = await self.loop.create_connection(
                    lambda: _TlsBytes(connection), sock=sock, ssl=self.tls, server_hostname=self.host
                )
            else:
                with contextlib.suppress(OSError):  # not Linux: no kernel stamps
                    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                self.loop.add_reader(sock, connection.readable)
        except BaseException:
            sock.close()
            raise
        connection.connect_s = monotonic() - started
        return connection


def wall_offset() -> float:
    """Seconds from the monotonic to the wall clock, in which the kernel stamps."""
    before = monotonic()
    wall = time()
    return wall - (before + monotonic()) / 2
