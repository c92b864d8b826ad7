"""The schedule of one worker: absolute due times, turns, connections, time-outs, own lag."""

import asyncio
import errno
from array import array
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from time import monotonic

from kit.loadgen.connection import Call, Connection, Connector, wall_offset
from kit.loadgen.plan import LAP_KEYS, Level, Target
from kit.loadgen.prompts import Conversation, PromptModel, request_bytes
from kit.loadgen.recorder import Recorder
from kit.workload import Session

# At most so many per round, then the loop reads what has arrived: sends never starve reads.
SENDS_PER_ROUND = 128
CATCH_UP_S = 0.01  # a pace that fell behind catches up by this much
LOOP_GRAIN_S = 0.001
PROBE_PERIOD_S = 0.01
PREBUILT_BYTES = 256 << 20  # requests made before the clock starts; later ones as they fall due
CONNECTS_AT_ONCE = 256  # well under the usual listen backlog
CONNECT_TIMEOUT_S = 10.0


class Driver:
    """Sends every request of a level at its time and hands each finished one to the recorder."""

    def __init__(self, target: Target, level: Level, prompts: PromptModel, recorder: Recorder) -> None:
        self.target, self.level, self.prompts = target, level, prompts
        self.recorder = recorder
        self.loop = asyncio.get_running_loop()
        self.connector = Connector(target, self, self.loop)
        self.wall_offset = wall_offset()
        self.read_lags, self.loop_lags = array("d"), array("d")
        self.idle: deque[Connection] = deque()
        self.in_flight: dict[Call, Connection | None] = {}
        self.waiting: deque[Call] = deque()
        # (-time, -ticket, a call or a session whose first call it is), the next one last
        self.due: list[tuple[float, int, Call | Session]] = []
        self.paced = 0.0
        self.ticket = count()
        self.sent = self.unsent_turns = self.open_sessions = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.stop_at = float("inf")
        self.refused = False
        self.over = asyncio.Event()
        self.sessions = self._sessions()
        first = level.sessions if level.slots is None else self._take(level.slots)
        self.first: list[Call | Session] = list(first)

    def _sessions(self) -> Iterator[Session]:
        """The sessions of a closed loop; a repeated list goes on under new keys."""
        if self.level.slots is None:
            return
        for lap in count():
            for session in self.level.sessions:
                yield replace(session, key=session.key + lap * LAP_KEYS, arrival_s=0.0)
            if not self.level.repeat:
                return

    def _take(self, n: int) -> Iterable[Session]:
        return (session for _, session in zip(range(n), self.sessions, strict=False))

    async def prepare(self) -> None:
        """Make the requests and open the connections."""
        size = 0
        for index, session in enumerate(self.first):
            if size > PREBUILT_BYTES or isinstance(session, Call):
                break
            self.first[index] = call = Call(Conversation(session, self.prompts), session.arrival_s)
            size += self._build(call)
        if not self.target.cold_connects:
            gate = asyncio.Semaphore(CONNECTS_AT_ONCE)
            await asyncio.gather(*(self._spare(gate) for _ in range(self.level.streams())))

    def _build(self, call: Call) -> int:
        call.conversation.ask()
        messages = call.conversation.messages
        call.data = request_bytes(self.target, messages, call.asked.output_len)
        return len(call.data)

    async def _spare(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                if not self.refused:
                    opening = asyncio.wait_for(self.connector.open(), CONNECT_TIMEOUT_S)
                    self.idle.append(await opening)
            except (OSError, TimeoutError):
                self.refused = True  # a request that lacks one opens its own, and tells why not

    def start(self, t0: float) -> None:
        """Begin the schedule at monotonic time t0."""
        if self.level.duration_s is not None:
            self.stop_at = t0 + self.level.duration_s
        self.open_sessions = len(self.first)
        for first in self.first:
            at = t0 + (first.scheduled if isinstance(first, Call) else first.arrival_s)
            self.due.append((-at, -next(self.ticket), first))
        self.first.clear()
        self.due.sort()
        self._sleep(-self.due[-1][0] - monotonic())
        self.loop.call_later(PROBE_PERIOD_S, self._probe, monotonic() + PROBE_PERIOD_S)

    def _at(self, call: Call, when: float) -> None:
        insort(self.due, (-when, -next(self.ticket), call))
        if self.due[-1][2] is call:
            self._sleep(when - monotonic())

    def _sleep(self, seconds: float) -> None:
        """Look again then; loop timers may fire a millisecond early."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(max(0.0, seconds), self._pump)

    def _pump(self) -> None:
        """Send what is due at the pace allowed, then sleep until the next."""
        self.timer = None
        now = monotonic()
        self.paced = max(self.paced, now - CATCH_UP_S)
        allowed = min(SENDS_PER_ROUND, int((now - self.paced) / self.level.send_gap_s))
        while self.due and self.due[-1][0] >= -now:
            if not allowed:
                self._sleep(LOOP_GRAIN_S if now - self.paced < LOOP_GRAIN_S else 0)
                return
            allowed -= 1
            self.paced += self.level.send_gap_s
            when, _, call = self.due.pop()
            if isinstance(call, Session):
                call = Call(Conversation(call, self.prompts))
            call.scheduled = call.due = -when
            self._launch(call)
        if self.due and self.timer is None:
            self._sleep(-self.due[-1][0] - now)

    def _launch(self, call: Call) -> None:
        cap = self.level.max_concurrency
        if cap is not None and len(self.in_flight) >= cap:
            self.waiting.append(call)
            return
        if call.data is None:
            self._build(call)
        while self.idle:
            connection = self.idle.popleft()
            if connection.open:
                self._send(connection, call)
                return
        self._send_on_new(call)

    def _send(self, connection: Connection, call: Call) -> None:
        self.in_flight[call] = connection
        self.sent += not call.retried
        connection.send(call)

    def _send_on_new(self, call: Call) -> None:
        self.in_flight[call] = None
        task = self.loop.create_task(self._connect_and_send(call))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connect_and_send(self, call: Call) -> None:
        try:
            connection = await asyncio.wait_for(self.connector.open(), self.target.timeout_s)
        except (OSError, TimeoutError) as error:
            out_of_files = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
            self._finish(call, "client_descriptors" if out_of_files else "connect", monotonic())
            return
        call.connect_s = connection.connect_s
        self._send(connection, call)

    def ended(self, connection: Connection, call: Call, arrival: float) -> None:
        """The answer is complete: the connection is free, the session may go on."""
        if self.target.cold_connects:
            connection.close()
        else:
            self.idle.append(connection)
        self._finish(call, None, arrival)

    def lost(self, connection: Connection, call: Call | None) -> None:
        """The connection closed: idle, before an answer (retried once if reused), or within one."""
        if call is None:
            return
        if connection.used > 1 and not call.arrivals and not call.retried:
            call.reset()
            call.retried = True
            self._send_on_new(call)
            return
        call.parse()
        call.parser.close()
        self._finish(call, call.parser.outcome(), monotonic())

    def _finish(self, call: Call, reason: str | None, end: float) -> None:
        del self.in_flight[call]
        call.end, call.reason = end, reason
        if self.waiting:
            held = self.waiting.popleft()
            held.due = end
            self._launch(held)
        conversation, turn = call.conversation, call.asked
        if not conversation.last or turn.children:
            call.parse()
            reason = reason or call.parser.outcome()
        self.recorder.add(call)
        conversation.over = conversation.last or reason is not None
        if reason is None and not conversation.last:
            conversation.answered("".join(call.parser.text or []))
        elif not conversation.last:
            self.unsent_turns += len(conversation.session.turns) - call.turn - 1
        children = turn.children if reason is None else ()
        conversation.children_left = len(children)
        for child in children:
            spawned = Conversation(child, self.prompts, conversation)
            self._at(Call(spawned), end + child.arrival_s)
        if not children:
            self._go_on(conversation, end)
        self._check_over()

    def _go_on(self, conversation: Conversation, end: float) -> None:
        """A turn and all its children are over: the next turn, or the end of the session."""
        parent = conversation.parent
        pause = conversation.session.turns[conversation.turn - 1].pause_after_s
        if not conversation.over and end + pause < self.stop_at:
            self._at(Call(conversation), end + pause)
        elif parent is not None:
            parent.children_left -= 1
            if not parent.children_left:
                self._go_on(parent, end)
        else:
            self.open_sessions -= 1
            if self.level.slots is not None and end < self.stop_at:
                for session in self._take(1):
                    self.open_sessions += 1
                    self._at(Call(Conversation(session, self.prompts)), end)

    def _check_over(self) -> None:
        if not (self.open_sessions or self.in_flight or self.due or self.waiting):
            self.over.set()

    def _probe(self, expected: float) -> None:
        """Measure how late the loop runs a timer; time out old requests; follow the wall clock."""
        now = monotonic()
        self.loop_lags.append(max(0.0, now - expected))
        self.wall_offset = wall_offset()
        while self.in_flight:
            call, connection = next(iter(self.in_flight.items()))
            if connection is None or now - call.sent < self.target.timeout_s:
                break
            connection.call = None
            connection.lose()
            call.parse()
            self._finish(call, "timeout", now)
        if not self.over.is_set():
            self.loop.call_later(PROBE_PERIOD_S, self._probe, now + PROBE_PERIOD_S)
