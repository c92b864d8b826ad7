"""Sessions through replicas in virtual time: the clock jumps from event to event.

Time is an integer number of femtoseconds (ticks), so that a run of decode steps summed in closed
form equals the same steps added one by one, and the same seed gives the same output.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import isqrt
from typing import Protocol

from kit.errors import unknown
from kit.scheduler import OPEN_END, Batch, Path, Request, Scheduler, SchedulerConfig
from kit.simulator.intervals import IntervalHistogram
from kit.workload import Session

TICKS_PER_S = 10**15
ROUTINGS = ("round-robin", "least-loaded", "session", "prefix")
COLUMNS = (
    "session", "turn", "replica", "arrival_s", "admitted_s", "first_s", "end_s", "input_len",
    "output_len", "hit_tokens", "reusable_tokens", "pause_s", "preemptions",
)  # fmt: skip


class StepTime(Protocol):
    """Seconds of one engine step; chunks are (new tokens, tokens before them)."""

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float: ...

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token read by the whole batch."""
        ...


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What serves the sessions, and how."""

    scheduler: SchedulerConfig
    replicas: int = 1
    routing: str = "session"
    keep_kv: bool = True  # False: a session's own KV is dropped at each pause
    warm_prefixes: bool = False  # shared prefixes are cached everywhere at the start
    ready_after_s: float = 0.0  # cold start: replicas serve nothing before
    until_s: float | None = None  # the clock stops here; None: when all is done
    step_by_step: bool = False  # no jumps (tests only: same answer, slower)


class Replica:
    """One engine: its scheduler and the step, or run of equal steps, that it is in."""

    __slots__ = ("base", "batch", "backlog", "end", "index", "scheduler", "slope", "start", "steps",
                 "version")  # fmt: skip

    def __init__(self, index: int, config: SchedulerConfig) -> None:
        self.index = index
        self.scheduler = Scheduler(config)
        self.batch: Batch | None = None
        self.start = self.end = self.base = self.slope = self.steps = self.version = 0
        self.backlog = 0  # prompt tokens sent here and not computed yet

    def ticks(self, steps: int) -> int:
        """Length of the first `steps` of the run."""
        return steps * self.base + self.slope * steps * (steps - 1) // 2

    def steps_until(self, tick: int) -> int:
        """Steps that end at or after `tick` while the run was already in them: when it can change."""
        wanted = tick - self.start
        if self.slope == 0:
            return max(1, -(-wanted // self.base))
        linear = 2 * self.base - self.slope
        steps = (isqrt(linear * linear + 8 * self.slope * max(wanted, 0)) - linear) // (
            2 * self.slope
        )
        steps = max(1, steps)
        while self.ticks(steps) < wanted:
            steps += 1
        return steps


class SessionState:
    """Where a session is: its next turn, context, cache chain and who waits for it."""

    __slots__ = ("chain", "context", "left", "parent", "pause_s", "replica", "resume_tick", "session",
                 "turn", "waiting_children")  # fmt: skip

    def __init__(self, session: Session, chain: int, parent: "SessionState | None" = None) -> None:
        self.session, self.chain, self.parent = session, chain, parent
        self.context = session.shared_prefix_tokens
        self.turn = self.waiting_children = self.resume_tick = 0
        self.pause_s = -1.0
        self.replica: Replica | None = None


class Simulation:
    """One run: replicas, sessions, and what happened to every turn."""

    def __init__(self, config: SimulationConfig, step_time: StepTime) -> None:
        if config.routing not in ROUTINGS:
            raise unknown("routing", config.routing, ROUTINGS)
        self.config, self.step_time = config, step_time
        self.replicas = [Replica(i, config.scheduler) for i in range(config.replicas)]
        self.turns = array("d")  # COLUMNS of each completed turn
        self.refusals: dict[str, int] = {}
        self.refused = self.sent = self.planned = self.events = 0
        self.waiting_since: dict[int, Request] = {}
        self.intervals = IntervalHistogram(TICKS_PER_S)
        self.now = 0
        self._heap: list[tuple[int, int, int, object]] = []
        self._lines: dict[int, tuple[int, int]] = {}
        self._keys = count(1)
        self._chains = count(1 << 40)
        self._turn = 0
        self._pick: Callable[[SessionState, Request], Replica] = {
            "round-robin": self._round_robin,
            "least-loaded": self._least_loaded,
            "session": self._sticky,
            "prefix": self._longest_prefix,
        }[config.routing]

    def run(self, sessions: Iterable[Session]) -> None:
        """Play the sessions (ordered by arrival) to the end, or to `until_s`."""
        limit = None if self.config.until_s is None else round(self.config.until_s * TICKS_PER_S)
        heap = self._heap
        for replica in self.replicas:
            if self.config.ready_after_s:
                replica.end = round(self.config.ready_after_s * TICKS_PER_S)
                replica.batch = Batch()
                heappush(heap, (replica.end, 1, replica.index, (replica, 0)))
        for session in sessions:
            arrival = round(session.arrival_s * TICKS_PER_S)
            if limit is not None and arrival >= limit:
                break
            self._until(arrival)
            self._begin(session, arrival, None)
        self._until(limit)
        self.now = self.now if limit is None else limit

    def _until(self, limit: int | None) -> None:
        """Process the events before `limit`, and arrivals at it; all of them when it is None."""
        heap = self._heap
        while heap and (limit is None or heap[0][:2] < (limit, 1)):
            self.now, kind, _, item = heappop(heap)
            self.events += 1
            if kind == 0:
                self._send(item)
            elif item[1] == item[0].version:
                self._step_end(item[0])

    def _begin(self, session: Session, tick: int, parent: SessionState | None) -> None:
        state = SessionState(session, next(self._chains), parent)
        self.planned += len(session.turns)
        heappush(self._heap, (tick, 0, next(self._keys), state))

    def _send(self, state: SessionState) -> None:
        """A turn arrives: make its request, choose a replica, queue it."""
        session, size = state.session, self.config.scheduler.block_size
        turn = session.turns[state.turn]
        if turn.compact_to is not None:
            state.chain = next(self._chains)
            state.context = session.shared_prefix_tokens + turn.compact_to
        if session.path and state.turn == 0:
            path = tuple((extent, tokens // size) for extent, tokens in session.path)
        else:
            path = ((state.chain, OPEN_END),)
            if session.shared_prefix_tokens >= size:
                path = ((-1 - session.prefix_id, session.shared_prefix_tokens // size), *path)
        request = Request(
            next(self._keys), state.context + turn.new_tokens, turn.output_len, path, state
        )
        request.times = [self.now]
        replica = state.replica = self._pick(state, request)
        scheduler = replica.scheduler
        was_empty = not scheduler.waiting
        self.sent += 1
        refusal = scheduler.add(request)
        if refusal is not None:
            self.refused += 1
            self.refusals[refusal] = self.refusals.get(refusal, 0) + 1
            self._end_session(state)
            return
        replica.backlog += request.input_len
        self.waiting_since[request.key] = request
        if replica.batch is None:
            self._plan(replica)
        elif was_empty and replica.steps > 1:
            self._shorten(replica)

    def _shorten(self, replica: Replica) -> None:
        """Somebody came: the run of decode steps ends with the step that is under way."""
        steps = replica.steps_until(self.now)
        if steps < replica.steps:
            replica.steps = steps
            replica.version += 1
            replica.end = replica.start + replica.ticks(steps)
            heappush(self._heap, (replica.end, 1, replica.index, (replica, replica.version)))

    def _plan(self, replica: Replica) -> None:
        """Start the replica's next step or run of steps now."""
        scheduler = replica.scheduler
        batch = replica.batch = scheduler.plan()
        if batch is None:
            return
        for request in batch.admitted:
            if len(request.times) == 1:
                request.times.append(self.now)
        if batch.chunks:
            chunks = [(tokens, before) for _, tokens, before in batch.chunks]
            seconds = self.step_time.step_s(chunks, batch.decodes, batch.context)
            replica.base, replica.slope, replica.steps = round(seconds * TICKS_PER_S), 0, 1
        else:
            line = self._lines.get(batch.decodes)
            if line is None:
                base_s, per_token_s = self.step_time.decode_line(batch.decodes)
                line = round(base_s * TICKS_PER_S), round(per_token_s * TICKS_PER_S)
                self._lines[batch.decodes] = line
            replica.base = line[0] + line[1] * batch.context
            replica.slope = line[1] * batch.decodes
            replica.steps = 1 if self.config.step_by_step else scheduler.horizon(batch)
        replica.start = self.now
        replica.version += 1
        replica.end = self.now + replica.ticks(replica.steps)
        heappush(self._heap, (replica.end, 1, replica.index, (replica, replica.version)))

    def _step_end(self, replica: Replica) -> None:
        batch = replica.batch
        if batch.decodes:
            self.intervals.add_run(replica.base, replica.slope, replica.steps, batch.decodes)
        first, finished = replica.scheduler.commit(batch, replica.steps)
        for _, tokens, _ in batch.chunks:
            replica.backlog -= tokens
        for request in first:
            if len(request.times) == 2:
                request.times.append(self.now)
                replica.backlog -= request.hit_tokens
        for request in finished:
            self._finish(replica, request)
        self._plan(replica)

    def _finish(self, replica: Replica, request: Request) -> None:
        """A turn ended: write it down, start its children, schedule the next turn."""
        state = request.owner
        del self.waiting_since[request.key]
        arrival, admitted, first = (tick / TICKS_PER_S for tick in request.times)
        reusable = state.context if state.turn else 0
        self.turns.extend((
            state.session.key, state.turn, replica.index, arrival, admitted, first,
            self.now / TICKS_PER_S, request.input_len, request.output_len, request.hit_tokens,
            reusable, state.pause_s, request.preemptions,
        ))  # fmt: skip
        turn = state.session.turns[state.turn]
        state.context = request.input_len + request.output_len
        state.turn += 1
        if state.turn == len(state.session.turns):
            self._end_session(state)
            return
        if not self.config.keep_kv:
            replica.scheduler.pool.drop(((state.chain, OPEN_END),))
        state.pause_s = turn.pause_after_s
        state.resume_tick = self.now + round(turn.pause_after_s * TICKS_PER_S)
        state.waiting_children = len(turn.children)
        for child in turn.children:
            self._begin(child, self.now + round(child.arrival_s * TICKS_PER_S), state)
        if not turn.children:
            heappush(self._heap, (state.resume_tick, 0, next(self._keys), state))

    def _end_session(self, state: SessionState) -> None:
        parent = state.parent
        if parent is not None:
            parent.waiting_children -= 1
            if parent.waiting_children == 0:
                tick = max(parent.resume_tick, self.now)
                heappush(self._heap, (tick, 0, next(self._keys), parent))

    def _round_robin(self, state: SessionState, request: Request) -> Replica:
        self._turn += 1
        return self.replicas[(self._turn - 1) % len(self.replicas)]

    def _least_loaded(self, state: SessionState, request: Request) -> Replica:
        return min(self.replicas, key=lambda r: len(r.scheduler.running) + len(r.scheduler.waiting))

    def _sticky(self, state: SessionState, request: Request) -> Replica:
        return state.replica or self._least_loaded(state, request)

    def _longest_prefix(self, state: SessionState, request: Request) -> Replica:
        """The replica with the least prompt left to compute, this request's misses included."""
        size = self.config.scheduler.block_size
        for replica in self.replicas:
            if replica.batch is not None and replica.steps > 1:
                replica.scheduler.grow(min(replica.steps, replica.steps_until(self.now)))
        return min(
            self.replicas,
            key=lambda r: (
                r.backlog - r.scheduler.pool.match(request.path) * size,
                len(r.scheduler.running),
            ),
        )
