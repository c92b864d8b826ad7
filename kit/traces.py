"""Recorded workloads in one form: readers for Azure, Mooncake, WEKA and BurstGPT files."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from kit.errors import UserError, unknown
from kit.workload import Session, Turn

MOONCAKE_BLOCK_TOKENS = 512  # per hash id; ids name whole prefixes, the last block may be partial
WEKA_BLOCK_TOKENS = 64
Row = dict[str, str]


@dataclass(slots=True)
class Call:
    """One recorded model call; tokens, seconds, None where the trace does not say."""

    arrival_s: float
    input_len: int
    output_len: int
    session: str = ""  # calls with one session name are its turns; "" stands alone
    parent: str = ""  # session that started this one as a sub-agent
    pause_s: float | None = None  # from the end of the session's call before
    elapsed_s: float = 0.0
    reusable_tokens: int = 0  # leading tokens that the session has sent before
    hash_ids: list[int] = field(default_factory=list)
    path: tuple[tuple[int, int], ...] = ()  # (extent, tokens at its end)


@dataclass(slots=True)
class Trace:
    """Calls by arrival, and what of the file was left out."""

    name: str
    calls: list[Call]
    skipped: int = 0  # recorded failures (no output)
    shared_clock: bool = True  # False: every session starts at its own zero

    def sessions(self, starts_s: Iterator[float] | None = None) -> Iterator[Session]:
        """Sessions by arrival, started at `starts_s` where the trace has no shared clock."""
        groups: dict[str, list[Call]] = {}
        for index, call in enumerate(self.calls):
            groups.setdefault(call.session or f"#{index}", []).append(call)
        built = {name: _session(key, calls) for key, (name, calls) in enumerate(groups.items())}
        for name, calls in groups.items():
            if calls[0].parent in built:
                _attach(built[name], calls[0], built[calls[0].parent], groups[calls[0].parent])
        for name, session in built.items():
            if groups[name][0].parent not in built:
                if starts_s is not None:
                    session.arrival_s = next(starts_s)
                yield session

    def block_paths(self, block_tokens: int) -> list[tuple[tuple[int, int], ...]]:
        """The calls' paths in hash blocks, partial last ones included."""
        return [tuple((extent, -(-tokens // block_tokens)) for extent, tokens in call.path) for call in self.calls]


def _session(key: int, calls: list[Call]) -> Session:
    """Turns whose prompts are as long as recorded; a shrunken or rewritten context starts anew."""
    turns: list[Turn] = []
    context = 0
    for before, call in pairwise([None, *calls]):
        assert call is not None
        turn = Turn(max(1, call.input_len - context), call.output_len)
        if before is not None:
            turns[-1].pause_after_s, turns[-1].pause_kind = call.pause_s or 0.0, "recorded"
            if call.input_len < 0.8 * before.input_len or (
                call.reusable_tokens < 0.5 * before.input_len and call.reusable_tokens
            ):
                turn.new_tokens, turn.compact_to = call.input_len, 0
                context = 0
        turns.append(turn)
        context += turn.new_tokens + turn.output_len
    return Session(key, calls[0].arrival_s, turns, path=calls[0].path)


def _attach(child: Session, first: Call, parent: Session, calls: list[Call]) -> None:
    """Make the child start after the parent's last call that began before it."""
    turn = max(0, sum(call.arrival_s <= first.arrival_s for call in calls) - 1)
    child.arrival_s = 0.0
    parent.turns[turn].children = [*parent.turns[turn].children, child]


def read(file: str, trace_format: str) -> Trace:
    """The trace of a file; UserError names the file and the line that cannot be read."""
    if trace_format not in READERS:
        raise unknown("trace format", trace_format, READERS)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such trace file: {file}")
    try:
        trace = READERS[trace_format](path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a text file ({error})") from None
    if not trace.calls:
        raise UserError(f"{file}: the trace has no requests")
    trace.calls.sort(key=lambda call: call.arrival_s)
    return trace


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Line numbers and fields of a CSV file that has these columns."""
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing and reader.fieldnames:
            raise UserError(f"{path} line 1: no column {missing[0]!r}; it needs {', '.join(columns)}")
        for row in reader:
            yield reader.line_num, row


def _call(path: Path, line: int, parse: Callable[[Any], Call], row: object) -> Call:
    """The call that `parse` reads; anything wrong with it is told with file and line."""
    try:
        call = parse(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} line {line}: {error}") from None
    if call.input_len < 1 or call.output_len < 0 or not 0 <= call.arrival_s < inf:
        raise UserError(
            f"{path} line {line}: input {call.input_len}, output {call.output_len} tokens at "
            f"{call.arrival_s:g} s: lengths and times cannot be negative, an input not empty"
        )
    return call


def _azure(path: Path) -> Trace:
    def parse(row: Row) -> Call:
        at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
        return Call(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))

    calls = []
    for line, row in _rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        calls.append(_call(path, line, parse, row))
    return _from_zero(Trace(path.name, calls))


def _mooncake(path: Path) -> Trace:
    def parse(text: str) -> Call:
        row = json.loads(text)
        ids = [int(i) for i in row["hash_ids"]]
        lengths = int(row["input_length"]), int(row["output_length"])
        call = Call(float(row["timestamp"]) / 1e3, *lengths, hash_ids=ids)
        if len(ids) != -(-call.input_len // MOONCAKE_BLOCK_TOKENS):
            raise ValueError(f"{len(ids)} hash_ids do not cover {call.input_len} tokens")
        return call

    calls = []
    with path.open(encoding="utf-8") as lines:
        for line, text in enumerate(lines, 1):
            if text.strip():
                calls.append(_call(path, line, parse, text))
    _set_paths(calls)
    return _from_zero(Trace(path.name, calls))


def _set_paths(calls: list[Call]) -> None:
    """Merge hash blocks that always occur together into extents: one node of a prefix tree each."""
    nodes: dict[tuple[int, int], int] = {}
    walks: list[list[int]] = []
    for call in calls:
        node = -1
        walks.append([node := nodes.setdefault((node, block), len(nodes)) for block in call.hash_ids])
    parents = [parent for parent, _ in nodes]
    children = [0] * len(nodes)
    for parent in parents:
        children[parent] += parent >= 0
    last = {walk[-1] for walk in walks}
    starts = [p < 0 or children[p] > 1 or p in last for p in parents]
    for call, walk in zip(calls, walks, strict=True):
        heads = [(node, place) for place, node in enumerate(walk) if starts[node]]
        ends = [place * MOONCAKE_BLOCK_TOKENS for _, place in heads[1:]] + [call.input_len]
        call.path = tuple((head, end) for (head, _), end in zip(heads, ends, strict=True))


def _weka(path: Path) -> Trace:
    def parse(row: Row) -> Call:
        name = f"{row['trace']}/{row['agent']}"
        parent = name.rpartition("/")[0] if "/" in row["agent"] else ""
        elapsed = float(row["api_time_s"] or 0)
        pause = row["think_time_s"]
        seen = int(row["seen_blocks_prefix"]) * WEKA_BLOCK_TOKENS
        tokens = int(row["in_tokens"])
        return Call(
            float(row["t_s"]), tokens, max(1, int(row["out_tokens"])), name, parent,
            float(pause) if pause else None, elapsed, min(seen, tokens),
        )  # fmt: skip

    columns = ("trace", "agent", "t_s", "in_tokens", "out_tokens", "seen_blocks_prefix",
               "api_time_s", "think_time_s")  # fmt: skip
    calls = []
    for line, row in _rows(path, columns):
        calls.append(_call(path, line, parse, row))
    return Trace(path.name, calls, shared_clock=False)


def _burstgpt(path: Path) -> Trace:
    def parse(row: Row) -> Call:
        elapsed = float(row.get("Elapsed time") or 0)
        session = row.get("Session ID") or ""
        return Call(
            float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]),
            session, elapsed_s=elapsed,
        )  # fmt: skip

    calls: list[Call] = []
    ended: dict[str, float] = {}
    skipped = 0
    for line, row in _rows(path, ("Timestamp", "Request tokens", "Response tokens")):
        call = _call(path, line, parse, row)
        if call.session in ended:
            call.pause_s = max(0.0, call.arrival_s - ended[call.session])
        if call.output_len == 0:
            skipped += 1
            continue
        if call.session:
            ended[call.session] = call.arrival_s + call.elapsed_s
        calls.append(call)
    return _from_zero(Trace(path.name, calls, skipped))


def _from_zero(trace: Trace) -> Trace:
    start = min((call.arrival_s for call in trace.calls), default=0.0)
    for call in trace.calls:
        call.arrival_s -= start
        call.output_len = max(1, call.output_len)
    return trace


READERS = {"azure": _azure, "mooncake": _mooncake, "weka": _weka, "burstgpt": _burstgpt}


def kept_hit_fraction(trace: Trace, keep_s: float) -> float:
    """Fraction of prompt tokens still cached if a session's KV is kept `keep_s` after each call."""
    calls = [call for call in trace.calls if not call.parent]
    kept = sum(c.reusable_tokens for c in calls if c.pause_s is not None and c.pause_s <= keep_s)
    return kept / sum(call.input_len for call in calls)
