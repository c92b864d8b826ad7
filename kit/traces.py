"""Recorded workloads in one form: readers for Azure, Mooncake, WEKA and BurstGPT files, and for those of kit record."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
    prefix_id: int = 0
    prefix_tokens: int = 0  # leading tokens that all sessions with this prefix_id share
    waited_for: str = "recorded"

    def __post_init__(self) -> None:
        times = self.arrival_s, self.elapsed_s, self.pause_s or 0.0
        if self.input_len < 1 or self.output_len < 0 or not all(0 <= value < inf for value in times):
            given = f"input {self.input_len}, output {self.output_len} tokens, times {times}"
            raise ValueError(f"{given}: lengths and times cannot be negative, an input not empty")

    @property
    def end_s(self) -> float:
        return self.arrival_s + self.elapsed_s


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
        for name, session in built.items():
            parent, start_s = groups[name][0].parent, groups[name][0].arrival_s
            if parent in built:  # starts after the parent's last call that began before it
                begun = sum(call.arrival_s <= start_s for call in groups[parent])
                turn = built[parent].turns[max(0, begun - 1)]
                spawned_s = groups[parent][max(0, begun - 1)].end_s if self.shared_clock else start_s
                session.arrival_s, turn.children = max(0.0, start_s - spawned_s), [*turn.children, session]
        for name, session in built.items():
            if groups[name][0].parent not in built:
                if starts_s is not None:
                    session.arrival_s = next(starts_s)
                yield session


def _session(key: int, calls: list[Call]) -> Session:
    """Turns whose prompts are as long as recorded; a shrunken or rewritten context starts anew."""
    first, shared = calls[0], calls[0].prefix_tokens
    turns = [Turn(first.input_len - shared, first.output_len)]
    context = first.input_len + first.output_len
    for before, call in pairwise(calls):
        turns[-1].pause_after_s, turns[-1].pause_kind = call.pause_s or 0.0, call.waited_for
        rewritten = call.reusable_tokens and call.reusable_tokens < 0.5 * before.input_len
        anew = rewritten or call.input_len < 0.8 * before.input_len
        context = shared if anew else context
        turns.append(Turn(max(1, call.input_len - context), call.output_len, compact_to=0 if anew else None))
        context += turns[-1].new_tokens + turns[-1].output_len
    return Session(key, first.arrival_s, turns, first.prefix_id, shared, first.path)


def read(file: str, trace_format: str) -> Trace:
    """The trace of a file; UserError names the file and the line that cannot be read."""
    if trace_format not in READERS:
        raise unknown("trace format", trace_format, READERS)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such trace file: {file}")
    calls = list(_calls(path, *READERS[trace_format]))
    answered = sorted((call for call in calls if call.output_len), key=lambda call: call.arrival_s)
    if not answered:
        raise UserError(f"{file}: the trace has no requests")
    trace = Trace(path.name, answered, len(calls) - len(answered), trace_format != "weka")
    if trace_format == "recorded":
        _part_interleaved(answered)
    _set_paths([call for call in answered if call.hash_ids])
    _set_pauses(answered)
    start_s = answered[0].arrival_s
    for call in answered:
        call.arrival_s -= start_s if trace.shared_clock else 0.0
    return trace


def _calls(path: Path, columns: str, parse: Callable[[Any], Call | None]) -> Iterator[Call]:
    """Calls of a file: rows of a CSV file that has these columns, or lines that `parse` takes apart."""
    number = 0

    def filled(lines: Iterable[str]) -> Iterator[str]:
        nonlocal number
        for line in lines:
            number += 1
            if line.strip():
                yield line

    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows: Any = filled(lines)
            if columns:
                rows, names = csv.DictReader(rows), columns.split(",")
                if missing := [name for name in names if name not in (rows.fieldnames or names)]:
                    raise ValueError(f"no column {missing[0]!r}; it needs {columns}")
            yield from filter(None, map(parse, rows))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a text file ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} line {number}: {error}") from None


def _azure(row: Row) -> Call:
    at_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    return Call(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(line: str) -> Call:
    row = json.loads(line)
    ids = [int(block) for block in row["hash_ids"]]
    input_len = int(row["input_length"])
    if len(ids) != -(-input_len // MOONCAKE_BLOCK_TOKENS):
        raise ValueError(f"{len(ids)} hash_ids do not cover {input_len} tokens")
    return Call(float(row["timestamp"]) / 1e3, input_len, int(row["output_length"]), hash_ids=ids)


def _weka(row: Row) -> Call:
    agent, tokens, pause = row["agent"], int(row["in_tokens"]), row["think_time_s"]
    return Call(
        float(row["t_s"]), tokens, int(row["out_tokens"]), f"{row['trace']}/{agent}",
        parent=f"{row['trace']}/{agent.rpartition('/')[0]}" if "/" in agent else "",
        pause_s=float(pause) if pause else None, elapsed_s=float(row["api_time_s"] or 0),
        reusable_tokens=min(int(row["seen_blocks_prefix"]) * WEKA_BLOCK_TOKENS, tokens),
    )  # fmt: skip


def _burstgpt(row: Row) -> Call:
    at_s, session, elapsed = float(row["Timestamp"]), row.get("Session ID"), row.get("Elapsed time")
    lengths = int(row["Request tokens"]), int(row["Response tokens"])
    return Call(at_s, *lengths, session=session or "", elapsed_s=float(elapsed or 0))


def _recorded(line: str) -> Call | None:
    row = json.loads(line)
    if "kit_recording" in row:
        return None
    start_s, lengths = float(row["start_s"]), (int(row["input_tokens"]), int(row["output_tokens"]))
    return Call(
        start_s, *lengths, row["session"], row["parent"], elapsed_s=float(row["end_s"]) - start_s,
        prefix_id=int(row["prefix"], 16), prefix_tokens=min(int(row["prefix_tokens"]), lengths[0] - 1),
        waited_for="tool" if row["tool_results"] else "human",
    )  # fmt: skip


def _part_interleaved(calls: list[Call]) -> None:
    """A sub-agent that goes on after its parent's next call is several: a turn waits for those it started."""
    begun: Counter[str] = Counter()
    named: dict[str, str] = {}
    for call in calls:
        own = call.session
        if call.parent:
            call.session, call.parent = f"{own}@{begun[call.parent]}", named.get(call.parent, call.parent)
        begun[own] += 1
        named[own] = call.session


def _set_paths(calls: list[Call]) -> None:
    """Merge hash blocks that always occur together into extents: one node of a prefix tree each."""
    nodes: dict[tuple[int, int], int] = {}
    walks: list[list[int]] = []
    for call in calls:
        node = -1
        walks.append([node := nodes.setdefault((node, block), len(nodes)) for block in call.hash_ids])
    children = Counter(parent for parent, _ in nodes)
    last = {walk[-1] for walk in walks}
    starts = [parent < 0 or children[parent] > 1 or parent in last for parent, _ in nodes]
    for call, walk in zip(calls, walks, strict=True):
        heads = [(node, place) for place, node in enumerate(walk) if starts[node]]
        ends = [place * MOONCAKE_BLOCK_TOKENS for _, place in heads[1:]] + [call.input_len]
        call.path = tuple((head, end) for (head, _), end in zip(heads, ends, strict=True))


def _set_pauses(calls: list[Call]) -> None:
    """Where a pause was not recorded: from the end of the session's call before."""
    ended: dict[str, float] = {}
    for call in calls:
        if call.session:
            if call.pause_s is None and call.session in ended:
                call.pause_s = max(0.0, call.arrival_s - ended[call.session])
            ended[call.session] = call.end_s
            if call.parent in ended:  # whose next call waits for this one
                ended[call.parent] = max(ended[call.parent], call.end_s)


READERS: dict[str, tuple[str, Callable[[Any], Call | None]]] = {
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens", _azure),
    "mooncake": ("", _mooncake),
    "weka": ("trace,agent,t_s,in_tokens,out_tokens,seen_blocks_prefix,api_time_s,think_time_s", _weka),
    "burstgpt": ("Timestamp,Request tokens,Response tokens", _burstgpt),
    "recorded": ("", _recorded),
}
