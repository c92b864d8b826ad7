"""Finished calls: parsed in slices between reads, appended to requests.jsonl, kept as columns."""

import asyncio
import json
import os
from array import array
from collections import Counter, deque
from time import monotonic
from typing import Any

import numpy as np

from kit.loadgen.connection import Call
from kit.metrics import token_gaps

SLICE_S = 0.001  # parse at most this long,
PERIOD_S = 0.005  # this often, while the run is on
READS_PER_STEP = 64
FLUSH_S = 0.25  # a kill loses at most what finished within this time
FLOATS = (
    "scheduled_s", "due_s", "sent_s", "first_token_s", "first_answer_s", "last_token_s", "end_s",
    "connect_s", "asked_tokens", "output_tokens", "first_chunk_tokens", "input_len",
    "prompt_tokens", "cached_tokens", "chunks", "status",
)  # fmt: skip


class Recorder:
    """Takes finished calls at once and does the work on them later."""

    def __init__(self, path: str | None) -> None:
        self.file = None
        if path is not None:
            # One write per flush with O_APPEND: lines of several workers never mix.
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.finished: deque[Call] = deque()
        self.columns = {name: array("d") for name in FLOATS}
        self.reasons: list[str | None] = []
        self.details: dict[str, str] = {}
        self.gaps = array("d")
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self.t0 = self.flushed = 0.0

    def start(self, t0: float) -> None:
        """Begin the slices; times are told relative to t0."""
        self.t0 = t0
        asyncio.get_running_loop().call_later(PERIOD_S, self._slice)

    def add(self, call: Call) -> None:
        """Queue a finished call; cheap, it runs between reads."""
        self.finished.append(call)
        self.counts["failed" if call.reason else "completed"] += 1

    def _slice(self) -> None:
        asyncio.get_running_loop().call_later(PERIOD_S, self._slice)
        until = monotonic() + SLICE_S
        while self.finished and monotonic() < until:
            self._step()
        if monotonic() > self.flushed + FLUSH_S:
            self.flush()

    def _step(self) -> None:
        call = self.finished[0]
        if call.parse(READS_PER_STEP):
            self.finished.popleft()
            self._record(call)

    def finish(self) -> dict[str, Any]:
        """Parse and write what is left; the columns, gaps and reasons of all calls."""
        while self.finished:
            self._step()
        self.flush()
        columns = {name: np.frombuffer(values) for name, values in self.columns.items()}
        gaps = np.frombuffer(self.gaps)
        return {"columns": columns, "reasons": self.reasons, "gaps": gaps, "details": self.details}

    def flush(self) -> None:
        """Append the waiting lines to the file."""
        self.flushed = monotonic()
        if self.lines and self.file is not None:
            os.write(self.file, "".join(self.lines).encode())
        self.lines.clear()

    def _record(self, call: Call) -> None:
        parser = call.parser
        reason = call.reason or parser.outcome()
        if reason is not None and call.reason is None:
            self.counts["completed"] -= 1
            self.counts["failed"] += 1
        if reason is not None and parser.detail:
            self.details.setdefault(reason, parser.detail)
        row = self._row(call)
        for name in FLOATS:
            self.columns[name].append(row[name])
        self.reasons.append(reason)
        gaps = self._gaps(call)
        if reason is None:
            self.gaps.frombytes(gaps.tobytes())
        if self.file is not None:
            self.lines.append(self._line(call, row, reason, gaps))

    def _row(self, call: Call) -> dict[str, float]:
        parser, nan = call.parser, float("nan")
        times, usage, t0 = parser.times, parser.usage, self.t0
        details = usage.get("prompt_tokens_details") or {}
        tokens = parser.output_tokens()
        told = parser.chunk_tokens[0] if times else 0.0
        answer = parser.first_answer_s
        values = (
            call.scheduled - t0, call.due - t0, call.sent - t0,
            times[0] - t0 if times else nan, nan if answer is None else answer - t0,
            times[-1] - t0 if times else nan, call.end - t0,
            nan if call.connect_s is None else call.connect_s,
            call.asked.output_len, tokens, told or max(1.0, tokens / max(1, len(times))),
            call.conversation.input_lens[call.turn], _number(usage.get("prompt_tokens")),
            _number(details.get("cached_tokens")), len(times), _number(parser.status),
        )  # fmt: skip
        return dict(zip(FLOATS, values, strict=True))

    def _gaps(self, call: Call) -> Any:
        parser = call.parser
        told = np.array(parser.chunk_tokens)
        known = told if len(told) and told.all() else None
        return token_gaps(np.array(parser.times), known, parser.output_tokens())

    def _line(self, call: Call, row: dict[str, float], reason: str | None, gaps: Any) -> str:
        record: dict[str, Any] = {"session": call.conversation.key, "turn": call.turn}
        record |= {"ok": reason is None, "reason": reason, "detail": call.parser.detail}
        record |= {name: None if x != x else round(x, 6) for name, x in row.items()}
        record |= {"usage": bool(call.parser.usage), "finish_reason": call.parser.finish_reason}
        return json.dumps(record | {"itl_ms": np.round(gaps * 1e3, 3).tolist()}) + "\n"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
