"""What is sent when: target, arrival process, sessions, and how they are dealt to workers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from urllib.parse import urlsplit

import numpy as np

from kit.errors import UserError
from kit.traces import read
from kit.workload import Session, Turn, generate, load

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
    def path(self) -> str:
        root = urlsplit(self.base_url).path.rstrip("/")
        root = root if root.endswith("/v1") else root + "/v1"
        return root + ("/chat/completions" if self.endpoint == "chat" else "/completions")


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
    repeat: bool = False  # closed loop by duration: begin the list again when it is used up
    send_gap_s: float = SEND_GAP_S  # of one worker

    def streams(self) -> int:
        """Connections to open before the clock starts."""
        if self.slots or self.max_concurrency:
            return min(self.slots or self.max_concurrency or 0, len(self.sessions))
        if self.kind == "burst":
            return len(self.sessions)
        times = np.sort([session.arrival_s for session in self.sessions])
        soon = np.searchsorted(times, times + PREOPENED_S) - np.arange(len(times))
        return min(len(times), int(soon.max()) + SPARE_CONNECTIONS)

    def deal(self, workers: int) -> list["Level"]:
        """Equal shares of sessions, slots and cap, pinned to workers before the run."""
        return [
            replace(
                self,
                sessions=self.sessions[index::workers],
                slots=_share(self.slots, index, workers),
                max_concurrency=_share(self.max_concurrency, index, workers),
                send_gap_s=self.send_gap_s * workers,
            )
            for index in range(workers)
        ]


def _share(total: int | None, index: int, parts: int) -> int | None:
    return None if total is None else total // parts + (index < total % parts)


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Absolute arrival times in s: gamma gaps of mean 1/rate and coefficient of variation given.

    >>> times = list(islice(arrivals(10.0, 1.0, 0), 10_000))
    >>> round(times[-1] / 1000, 1)
    1.0
    """
    shape = 1 / burstiness**2
    draw = np.random.default_rng(seed)
    now = 0.0
    while True:
        for gap in draw.gamma(shape, 1 / (rate * shape), 1024):
            now += float(gap)
            yield now


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

    def take(n: int) -> list[Session]:
        laps = (replace(s, key=s.key + lap * LAP_KEYS) for lap in count() for s in sessions)
        return list(islice(laps, n))

    return take


def own_arrivals(sessions: list[Session], duration_s: float | None = None) -> Level:
    """A level of sessions at the times that they bring along, the first at 0."""
    first = min((session.arrival_s for session in sessions), default=0.0)
    shifted = [replace(session, arrival_s=session.arrival_s - first) for session in sessions]
    kept = [s for s in shifted if duration_s is None or s.arrival_s < duration_s]
    if not kept:
        raise UserError("no session arrives: want a larger --requests or --duration")
    return Level("sessions", kept, "sessions", duration_s=duration_s)


def level(
    kind: str,
    value: float,
    source: Source,
    *,
    requests: int | None = None,
    duration_s: float | None = None,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    seed: int = 0,
) -> Level:
    """A burst of `value`, a closed loop of `value` slots, or `value` arrivals per second."""
    name = f"{kind}-{value:g}"
    if kind == "burst":
        sessions = [replace(session, arrival_s=0.0) for session in source(int(value))]
        return Level(name, sessions, kind, value, duration_s=duration_s)
    if kind == "concurrency":
        slots = int(value)
        repeat = requests is None and duration_s is not None
        count = requests or (slots if repeat else 10 * slots)
        sessions = source(count)
        return Level(name, sessions, kind, value, slots, None, duration_s, repeat)
    if requests is None and duration_s is None:
        duration_s = DEFAULT_RATE_DURATION_S
    times = []
    for at in islice(arrivals(value, burstiness, seed), requests):
        if duration_s is not None and at > duration_s:
            break
        times.append(at)
    if not times:
        raise UserError(f"--request-rate {value:g}: no arrival within {duration_s:g} s")
    pairs = zip(source(len(times)), times, strict=True)
    sessions = [replace(session, arrival_s=at) for session, at in pairs]
    return Level(name, sessions, kind, value, None, max_concurrency, duration_s)
