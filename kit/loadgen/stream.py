"""A streamed answer from raw reads: HTTP framing, SSE events, tokens and their arrival times.

The parser is fed (bytes, arrival time) pairs in order, split anywhere, as late as is convenient.
"""

import json
from array import array
from typing import Any

import httptools

DONE = b"[DONE]"
NO_CHOICE: list[dict[str, Any]] = [{}]


class StreamParser:
    """One HTTP response: what it said, when each token chunk arrived, and why it failed."""

    def __init__(self, keep_text: bool = False) -> None:
        self.status: int | None = None
        self.complete = False  # the response body ended as HTTP says it must
        self.done = False  # [DONE] was seen
        self.reason: str | None = None
        self.detail: str | None = None
        self.times = array("d")
        self.first_answer_s: float | None = None
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.chunk_tokens = array("d")  # per token chunk, where the server says so
        self.text: list[str] | None = [] if keep_text else None
        self._http = httptools.HttpResponseParser(self)
        self._framed = self._is_events = self._head_done = False
        self._after_cr = self._ending = False
        self._now = 0.0
        self._tail = self._body = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes, arrival_s: float) -> None:
        """Take the next bytes of the response, which arrived at `arrival_s`."""
        if self.complete or self.reason == "garbage":
            return
        self._now = arrival_s
        try:
            self._http.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("garbage", str(error))

    def close(self) -> None:
        """The connection ended, which completes a body that has no other end."""
        if not self.complete and self._head_done and not self._framed:
            self.on_message_complete()

    def outcome(self) -> str | None:
        """None for a good answer, else the reason of the failure."""
        if self.reason:
            return self.reason
        if self.status is None:
            return "closed"
        if self.status != 200:
            return f"http_{self.status}"
        if not self.complete or not self.done:
            return "cut" if self._is_events else "not_a_stream"
        return None if self.times else "no_token"

    def output_tokens(self) -> int:
        """Tokens of the answer: `usage.completion_tokens`, else the number of token chunks."""
        counted = self.usage.get("completion_tokens")
        return counted if isinstance(counted, int) else len(self.times)

    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.lower()
        self._framed |= name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value)
        self._is_events |= name == b"content-type" and b"event-stream" in value

    def on_headers_complete(self) -> None:
        self.status = self._http.get_status_code()
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        if self.status == 200 and self._is_events:
            if self.reason is None:
                self._lines(body)
        elif len(self._body) < 500:
            self._body += body

    def on_message_complete(self) -> None:
        self.complete = self._ending = True
        if self._tail or self._data:
            self._lines(b"\n\n")
        if self._body:
            self.detail = self._body[:300].decode(errors="replace")

    def _lines(self, body: bytes) -> None:
        """Split into SSE lines (LF, CRLF or CR, cut anywhere) and dispatch at each blank line."""
        if self._after_cr and body[:1] == b"\n":
            body = body[1:]
        self._after_cr = body[-1:] == b"\r"
        if not body:
            return
        lines = (self._tail + body).splitlines()
        self._tail = b"" if body[-1] in b"\r\n" else lines.pop()
        for line in lines:
            if line[:5] == b"data:":
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                self._event(event)

    def _event(self, event: bytes) -> None:
        if event == DONE:
            self.done = True
            return
        try:
            self._chunk(json.loads(str(event, "utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            if not self._ending:  # an unfinished last event is what a cut stream leaves
                self._fail("garbage", f"{error}: {event[:100]!r}")

    def _chunk(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error") or chunk.get("object") == "error":
            self._fail("error_in_stream", str(chunk.get("error") or chunk.get("message"))[:300])
            return
        before = self.usage.get("completion_tokens") or 0
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        choice = (chunk.get("choices") or NO_CHOICE)[0]
        delta = choice.get("delta") or choice
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        # What carries tokens; a role, an empty string or null is no token.
        text = "" + (delta.get("content") or delta.get("text") or delta.get("refusal") or "")
        answers = text or delta.get("tool_calls") or delta.get("function_call")
        if not (answers or delta.get("reasoning") or delta.get("reasoning_content")):
            return
        self.times.append(self._now)
        self.chunk_tokens.append(_tokens_told(choice, chunk, before))
        if answers and self.first_answer_s is None:
            self.first_answer_s = self._now
        if self.text is not None and text:
            self.text.append(text)

    def _fail(self, reason: str, detail: str) -> None:
        self.reason = self.reason or reason
        self.detail = self.detail or detail


def _tokens_told(choice: dict[str, Any], chunk: dict[str, Any], before: int) -> int:
    """Tokens in this chunk where token ids, log-probabilities or a running usage tell, else 0."""
    if choice.get("token_ids"):
        return len(choice["token_ids"])
    if choice.get("logprobs") and choice["logprobs"].get("content"):
        return len(choice["logprobs"]["content"])
    running = (chunk.get("usage") or {}).get("completion_tokens")
    return running - before if isinstance(running, int) else 0
