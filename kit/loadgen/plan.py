"""What is sent when: target, arrival process, sessions, and how they are dealt to workers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice, takewhile
from math import inf
from urllib.parse import urlsplit

import numpy as np

from kit.errors import UserError
from kit.traces import read
from kit.workload import Session, Turn, generate, load
from kit.workload.arrivals import Renewal

# Past this a single event loop (about 6 us per read) has no room left for 50 ms tokens.
STREAMS_PER_WORKER = 10_000
PREOPENED_S = 2.0  # an open loop starts with connections for its densest seconds
DEFAULT_RATE_DURATION_S = 60.0
SPARE_CONNECTIONS = 8
# Requests that fall due together are sent at this pace: a server on the same machine, which has to
# take each in, keeps up, and 10,000 are still out within 0.15 s.
SEND_GAP_S = 13e-6
OPEN_LOOPS = ("request_rate", "sessions")
LAP_KEYS = 10_000_000  # keys of a list of sessions that is begun again: texts of their own

Source = Callable[[int], list[Session]]


@dataclass(frozen=True)
class Target:
    """The server and how each request is put to it; the key itself stays in the environment."""

    base_url: str
    model: str
    endpoint: str = "chat"
    api_key_env: str | None = None
    timeout_s: float = 600.0
    cold_connects: bool = False
    engine_fields: bool = True  # ignore_eos and min_tokens, which only inference engines know

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        try:
            named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            named = False
        if not named:
            raise UserError(f"--base-url {self.base_url!r}: want http://HOST:PORT or https://HOST")

    @property
    def tls(self) -> bool:
        return urlsplit(self.base_url).scheme == "https"

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.base_url)
        return parts.hostname or "", parts.port or (443 if self.tls else 80)

    @property
    def root(self) -> str:
        """The server's address without /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        return urlsplit(self.root).path + ("/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions")


@dataclass(frozen=True)
class Level:
    """One measured level: sessions with arrival times, or `slots` that take the next when free."""

    name: str
    sessions: list[Session] = field(repr=False)
    kind: str  # burst, concurrency, request_rate or sessions (their own arrival times)
    value: float | None = None
    slots: int | None = None
    max_concurrency: int | None = None  # open loop: wait in the client beyond this many
    duration_s: float | None = None  # start no session and no turn after this
    turns: int | None = None  # nor once so many were sent
    repeat: bool = False  # closed loop by duration: begin the list again when it is used up
    send_gap_s: float = SEND_GAP_S  # of one worker

    def streams(self) -> int:
        """Connections to open before the clock starts."""
        if places := self.slots or self.max_concurrency:
            return min(places, len(self.sessions))
        if self.kind == "burst":
            return len(self.sessions)
        times = np.sort([session.arrival_s for session in self.sessions])
        soon = np.searchsorted(times, times + PREOPENED_S) - np.arange(len(times))
        return min(len(times), int(soon.max()) + SPARE_CONNECTIONS)

    def deal(self, workers: int) -> list["Level"]:
        """Equal shares of sessions, slots and cap, pinned to workers before the run."""

        def share(total: int | None, index: int) -> int | None:
            return None if total is None else len(range(index, total, workers))

        return [
            replace(
                self, sessions=self.sessions[index::workers], slots=share(self.slots, index),
                max_concurrency=share(self.max_concurrency, index), turns=share(self.turns, index),
                send_gap_s=self.send_gap_s * workers,
            )
            for index in range(workers)
        ]  # fmt: skip


def fixed_sessions(input_len: int, output_len: int) -> Source:
    """A source of n one-turn sessions of these lengths."""
    return lambda n: [Session(key, 0.0, [Turn(input_len, output_len)]) for key in range(n)]


def workload_sessions(name: str, seed: int) -> Source:
    """A source of n sessions of a workload."""
    workload = load(name)
    return lambda n: list(generate(workload, seed, sessions=n))


def trace_sessions(path: str, trace_format: str) -> Source:
    """A source of n sessions of a trace, begun again under new keys where it has fewer."""
    sessions = list(read(path, trace_format).sessions())
    if not sessions:
        raise UserError(f"{path}: no session in it")
    return lambda n: list(islice(laps(sessions), n))


def laps(sessions: list[Session]) -> Iterator[Session]:
    """The sessions again and again, each time under keys, and so with texts, of their own."""
    return (replace(one, key=one.key + lap * LAP_KEYS) for lap in count() for one in sessions)


def faster(sessions: Iterable[Session], speed: float) -> Iterator[Session]:
    """The sessions with every gap and pause divided by `speed`."""
    for one in sessions:
        turns = [
            replace(turn, pause_after_s=turn.pause_after_s / speed, children=list(faster(turn.children, speed)))
            for turn in one.turns
        ]
        yield replace(one, arrival_s=one.arrival_s / speed, turns=turns)


def own_arrivals(sessions: Iterable[Session], duration_s: float | None = None) -> Level:
    """A level of sessions, ordered by arrival, at the times that they bring along, the first at 0."""
    ordered = list(sessions)
    kept = [replace(session, arrival_s=session.arrival_s - ordered[0].arrival_s) for session in ordered]
    kept = [session for session in kept if session.arrival_s < (duration_s or inf)]
    if not kept:
        raise UserError("no session arrives: want a larger --requests or --duration")
    return Level("sessions", kept, "sessions", duration_s=duration_s)


def level(
    kind: str, value: float, source: Source, *, requests: int | None = None, duration_s: float | None = None,
    burstiness: float = 1.0, max_concurrency: int | None = None, seed: int = 0,
) -> Level:  # fmt: skip
    """A burst of `value`, a closed loop of `value` slots, or `value` arrivals per second.

    Gaps of a rate are gamma distributed with `burstiness` as their coefficient of variation.
    """
    n, slots, repeat = int(value), None, False
    times = [0.0] * n
    if kind == "concurrency":
        slots, repeat = n, requests is None and duration_s is not None
        times = [0.0] * (requests or (n if repeat else 10 * n))
    elif kind == "request_rate":
        if requests is None and duration_s is None:
            duration_s = DEFAULT_RATE_DURATION_S
        process = Renewal(kind="gamma", rate_per_s=value, cv=burstiness)
        drawn = takewhile(lambda at: at <= (duration_s or inf), process.times(np.random.default_rng(seed)))
        times = list(islice(drawn, requests))
        if not times:
            raise UserError(f"--request-rate {value:g}: no arrival within {duration_s:g} s")
    pairs = zip(source(len(times)), times, strict=True)
    sessions = [replace(session, arrival_s=at) for session, at in pairs]
    return Level(f"{kind}-{value:g}", sessions, kind, value, slots, max_concurrency, duration_s, repeat=repeat)
