"""Sessions through replicas in virtual time: the clock jumps from event to event."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from types import EllipsisType
from typing import Any

from kit.scheduler import OPEN_END, Path, Request, SchedulerConfig, StepTime
from kit.simulator.intervals import IntervalHistogram
from kit.simulator.replica import Replica
from kit.simulator.routing import router
from kit.simulator.steps import TICKS_PER_S, RequestTime, StepClock
from kit.workload import Session

COLUMNS = (
    "session", "turn", "last_turn", "key", "replica", "arrival_s", "admitted_s", "first_s",
    "end_s", "input_len", "output_len", "hit_tokens", "reusable_tokens", "pause_s", "preemptions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What serves the sessions, and how."""

    scheduler: SchedulerConfig
    replicas: int = 1
    routing: str = "session"
    keep_kv: bool = True  # False: a session's own KV is lost at each pause
    warm: bool = False  # shared prefixes are cached on every replica when first seen
    ready_after_s: float = 0.0  # a cold start: replicas serve nothing before
    until_s: float | None = None  # the clock stops here; None: when all is done
    step_by_step: bool = False  # no jumps: the same answer, slowly
    request_s: RequestTime | EllipsisType | None = ...  # API and tokeniser; ...: as the step time says, None: no time


class SessionState:
    """Where a session is: next turn, context, cache chain, and who waits for it."""

    def __init__(self, session: Session, number: int, parent: "SessionState | None") -> None:
        self.session, self.parent = session, parent
        self.number = number if parent is None else -number  # negative: a sub-agent
        self.chain = OPEN_END + number  # extent of its own context
        self.context = session.shared_prefix_tokens
        self.turn = self.waiting_children = 0
        self.pause_s = -1.0
        self.replica: Replica | None = None


class Simulation:
    """One run: replicas, sessions, and what happened to every turn.

    No turn is sent after `stop_s` or beyond `most` turns; unlike at `until_s`, what was sent runs to its end.
    """

    def __init__(self, config: SimulationConfig, step_time: StepTime, stop_s: float = inf, most: float = inf) -> None:
        self.config, self.stop, self.left = config, stop_s * TICKS_PER_S, most
        clock = StepClock(step_time, config.request_s)
        self.replicas = [Replica(i, config.scheduler, clock) for i in range(config.replicas)]
        self.route = router(config.routing, self.replicas)
        self.turns = array("d")  # COLUMNS of each completed turn
        self.refusals = Counter[str]()
        self.refused: list[Request] = []
        self.planned = self.events = self.now = 0
        self.in_flight: dict[int, Request] = {}
        self.intervals = IntervalHistogram(TICKS_PER_S)
        self._heap: list[tuple[int, int, int, Any]] = []
        self._numbers = count(1)
        self._warmed: set[int] = set()

    def run(self, sessions: Iterable[Session]) -> "Simulation":
        """Play the sessions (ordered by arrival) to their end, or to `until_s`."""
        until_s = self.config.until_s
        limit = inf if until_s is None else round(until_s * TICKS_PER_S)
        for session in sessions:
            arrival = round(session.arrival_s * TICKS_PER_S)
            if arrival >= limit:
                break
            self._play((arrival, 0))
            self._begin(session, arrival, None)
        self._play((limit, 0))
        if until_s is not None:
            self.now = round(limit)
            for replica in self.replicas:
                replica.cut(self.now, self.intervals)
        return self

    def _play(self, stop: tuple[float, int]) -> None:
        """Process the events before `stop`; at one instant arrivals (0), step ends (1), plans (2)."""
        heap = self._heap
        while heap and heap[0][:2] < stop:
            self.now, kind, _, item = heappop(heap)
            self.events += 1
            if kind == 0 and isinstance(item, Request):
                self._queue(item)
            elif kind == 0:
                self._send(item)
            elif kind == 2:
                self._plan(item[0])
            elif item[1] == item[0].version:
                self._step_end(item[0])

    def _begin(self, session: Session, tick: int, parent: SessionState | None) -> None:
        state = SessionState(session, next(self._numbers), parent)
        self.planned += len(session.turns)
        self._arrive(state, tick)

    def _arrive(self, state: SessionState, tick: int) -> None:
        if tick < self.stop and self.left > 0:
            self.left -= 1
            heappush(self._heap, (tick, 0, next(self._numbers), state))

    def _send(self, state: SessionState, arrival: int | None = None) -> None:
        """A turn arrives: make its request, choose a replica, send it there."""
        turn = state.session.turns[state.turn]
        if turn.compact_to is not None:
            state.chain = OPEN_END + next(self._numbers)
            state.context = state.session.shared_prefix_tokens + turn.compact_to
        input_len, path = state.context + turn.new_tokens, self._path(state)
        request = Request(next(self._numbers), input_len, turn.output_len, path, state)
        request.times = [self.now if arrival is None else arrival]
        replica = state.replica = self.route(request, state.replica, self.now)
        if (refusal := replica.scheduler.refusal(request, replica.arriving)) is not None:
            self.refused.append(request)
            self.refusals[refusal] += 1
            self._end_session(state)
            return
        replica.backlog_tokens += input_len
        self.in_flight[request.key] = request
        replica.arriving += 1
        if ticks := replica.clock.request_ticks(input_len, replica.load):
            heappush(self._heap, (self.now + ticks, 0, next(self._numbers), request))
        else:
            self._queue(request)

    def _queue(self, request: Request) -> None:
        """API and tokeniser are done with a request: its scheduler takes it in."""
        if request.key not in self.in_flight:
            return  # its replica is gone
        replica: Replica = request.owner.replica
        replica.arriving -= 1
        was_empty = not replica.scheduler.waiting
        replica.scheduler.queue(request)
        if replica.batch is None and not replica.pending:
            self._plan_next(replica)
        elif was_empty and replica.steps > 1 and replica.shorten(self.now):
            self._announce(replica)

    def _path(self, state: SessionState) -> Path:
        """Where the turn's prompt lies in a prefix cache: shared prefix, then the session's own."""
        session, size = state.session, self.config.scheduler.block_size
        if session.path and state.turn == 0:
            return tuple((extent, tokens // size) for extent, tokens in session.path)
        own = (state.chain, OPEN_END)
        if session.shared_prefix_tokens < size:
            return (own,)
        shared = (-1 - session.prefix_id, session.shared_prefix_tokens // size)
        if self.config.warm and session.prefix_id not in self._warmed:
            self._warmed.add(session.prefix_id)
            for replica in self.replicas:
                replica.scheduler.pool.store((shared,))
        return (shared, own)

    def _announce(self, replica: Replica) -> None:
        heappush(self._heap, (replica.end, 1, replica.index, (replica, replica.version)))

    def _plan_next(self, replica: Replica) -> None:
        """Plan now, but after everything else that happens at this instant, and not before ready."""
        ready = max(self.now, round(self.config.ready_after_s * TICKS_PER_S))
        if ready == self.now and (not self._heap or self._heap[0][0] > self.now):
            self._plan(replica)
            return
        replica.pending = True
        heappush(self._heap, (ready, 2, replica.index, (replica, 0)))

    def _plan(self, replica: Replica) -> None:
        """Start the replica's next step or run of steps."""
        batch = replica.plan(self.now, step_by_step=self.config.step_by_step)
        if batch is not None:
            for request in batch.admitted:
                if len(request.times) == 1:
                    request.times.append(self.now)
            self._announce(replica)

    def _step_end(self, replica: Replica) -> None:
        first, finished = replica.finish(self.intervals)
        for request in first:
            if len(request.times) == 2:
                request.times.append(self.now)
                replica.backlog_tokens -= request.hit_tokens
        for request in finished:
            self._finish(replica, request)
        self._plan_next(replica)

    def _finish(self, replica: Replica, request: Request) -> None:
        """A turn ended: write it down, start its children, schedule the next turn."""
        state: SessionState = request.owner
        del self.in_flight[request.key]
        session, turn = state.session, state.session.turns[state.turn]
        last = state.turn + 1 == len(session.turns)
        arrival_s, admitted_s, first_s = (tick / TICKS_PER_S for tick in request.times)
        reusable = state.context if state.turn else 0
        self.turns.extend((
            state.number, state.turn, last, session.key, replica.index, arrival_s, admitted_s,
            first_s, self.now / TICKS_PER_S, request.input_len, request.output_len,
            request.hit_tokens, reusable, state.pause_s, request.preemptions,
        ))  # fmt: skip
        state.context = request.input_len + request.output_len
        state.turn += 1
        if last and not turn.children:
            self._end_session(state)
            return
        if not self.config.keep_kv:
            replica.scheduler.pool.drop(((state.chain, OPEN_END),))
        state.pause_s = turn.pause_after_s
        state.waiting_children = len(turn.children)
        for child in turn.children:
            self._begin(child, self.now + round(child.arrival_s * TICKS_PER_S), state)
        if not turn.children:
            self._pause(state)

    def _pause(self, state: SessionState) -> None:
        """The next turn comes a pause after its session's last one, and all that it waited for, has ended."""
        pause_s = state.session.turns[state.turn - 1].pause_after_s
        self._arrive(state, self.now + round(pause_s * TICKS_PER_S))

    def _end_session(self, state: SessionState) -> None:
        if (parent := state.parent) is not None:
            parent.waiting_children -= 1
            if parent.waiting_children == 0 and parent.turn == len(parent.session.turns):
                self._end_session(parent)
            elif parent.waiting_children == 0:
                self._pause(parent)
