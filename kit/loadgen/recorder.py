"""Finished calls: parsed in slices between reads, appended to requests.jsonl, kept as columns."""

import asyncio
import json
import os
from array import array
from collections import Counter, deque
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from kit.loadgen.connection import Call
from kit.metrics import Floats, token_gaps

SLICE_S = 0.001  # parse at most this long,
PERIOD_S = 0.005  # this often, while the run is on
READS_PER_STEP = 64
FLUSH_S = 0.25  # a kill loses at most what finished within this time
NAN = float("nan")
COLUMNS = (
    "scheduled_s", "due_s", "sent_s", "first_token_s", "first_answer_s", "last_token_s", "end_s", "connect_s",
    "asked_tokens", "output_tokens", "first_chunk_tokens", "input_len", "prompt_tokens", "cached_tokens",
    "chunks", "status",
)  # fmt: skip


class Recorder:
    """Takes finished calls at once and does the work on them later."""

    def __init__(self, path: str | None) -> None:
        # One write per flush with O_APPEND: lines of several workers never mix.
        self.file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.finished: deque[Call] = deque()
        self.rows, self.gaps = array("d"), array("d")
        self.reasons: list[str | None] = []
        self.details: dict[str, str] = {}
        self.lines: list[str] = []
        self.unwritten = b""
        self.counts: Counter[str] = Counter()
        self.t0 = self.flushed = 0.0

    def start(self, t0: float) -> None:
        """Begin the slices; times are told relative to t0."""
        self.t0 = t0
        asyncio.get_running_loop().call_later(PERIOD_S, self._slice)

    def _slice(self) -> None:
        asyncio.get_running_loop().call_later(PERIOD_S, self._slice)
        until = monotonic() + SLICE_S
        while self.finished and monotonic() < until:
            self._step()
        if monotonic() > self.flushed + FLUSH_S:
            self.flush()

    def _step(self) -> None:
        if self.finished[0].parse(READS_PER_STEP):
            self._record(self.finished.popleft())

    def finish(self) -> dict[str, Any]:
        """Parse and write what is left; the rows, gaps and reasons of all calls."""
        while self.finished:
            self._step()
        self.flush()
        rows = np.frombuffer(self.rows).reshape(-1, len(COLUMNS))
        told = {"rows": rows, "reasons": self.reasons, "gaps": np.frombuffer(self.gaps), "details": self.details}
        return {**told, "unwritten": self.unwritten.count(b"\n")}

    def flush(self) -> None:
        """Append the waiting lines to the file; what a full disk does not take waits for the next time."""
        self.flushed = monotonic()
        if self.file is not None:
            self.unwritten += "".join(self.lines).encode()
        self.lines.clear()
        with suppress(OSError):
            while self.unwritten and self.file is not None:
                self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]

    def _record(self, call: Call) -> None:
        reason = call.reason or call.parser.outcome()
        self.counts["failed" if reason else "completed"] += 1
        self.reasons.append(reason)
        if reason and call.parser.detail:
            self.details.setdefault(reason, call.parser.detail)
        row, gaps = self._row(call), self._gaps(call)
        self.rows.extend(row)
        if reason is None:
            self.gaps.frombytes(gaps.tobytes())
        if self.file is not None:
            self.lines.append(self._line(call, row, reason, gaps))

    def _row(self, call: Call) -> tuple[float, ...]:
        parser, t0 = call.parser, self.t0
        tokens, chunks = parser.output_tokens(), len(parser.times)
        first, last, told = (parser.times[0], parser.times[-1], parser.chunk_tokens[0]) if chunks else (NAN, NAN, 0.0)
        answer, details = _number(parser.first_answer_s), parser.usage.get("prompt_tokens_details") or {}
        return (
            call.scheduled - t0, call.due - t0, call.sent - t0, first - t0, answer - t0, last - t0,
            call.end - t0, call.connect_s, call.asked.output_len, tokens, told or max(1.0, tokens / max(1, chunks)),
            call.conversation.input_lens[call.turn], _number(parser.usage.get("prompt_tokens")),
            _number(details.get("cached_tokens")), chunks, _number(parser.status),
        )  # fmt: skip

    def _gaps(self, call: Call) -> Floats:
        told = np.array(call.parser.chunk_tokens)
        return token_gaps(np.array(call.parser.times), told if told.all() else None, call.parser.output_tokens())

    def _line(self, call: Call, row: tuple[float, ...], reason: str | None, gaps: Floats) -> str:
        record: dict[str, Any] = {"session": call.conversation.key, "turn": call.turn}
        record |= {"ok": reason is None, "reason": reason, "detail": call.parser.detail}
        record |= {name: None if x != x else round(x, 6) for name, x in zip(COLUMNS, row, strict=True)}
        record |= {"usage": bool(call.parser.usage), "finish_reason": call.parser.finish_reason}
        return json.dumps(record | {"itl_ms": np.round(gaps * 1e3, 3).tolist()}) + "\n"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else NAN
