"""The schedule of one worker: absolute due times, turns, connections, time-outs, own lag."""

import asyncio
import errno
from array import array
from bisect import insort
from collections import deque
from itertools import count, islice
from time import monotonic

from kit.loadgen.connection import Call, Connection, Connector, wall_offset
from kit.loadgen.plan import Level, Target, laps
from kit.loadgen.prompts import Conversation, PromptModel, request_bytes
from kit.loadgen.recorder import Recorder

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
        self.target, self.level, self.prompts, self.recorder = target, level, prompts, recorder
        self.loop = asyncio.get_running_loop()
        self.connector = Connector(target, self, self.loop)
        self.wall_offset = wall_offset()
        self.read_lags, self.loop_lags = array("d"), array("d")
        self.idle: deque[Connection] = deque()
        self.in_flight: dict[Call, Connection | None] = {}
        self.due: list[tuple[float, int, Call]] = []  # -when, -ticket, what; the next one last
        self.waiting: deque[Call] = deque()  # held by a cap
        self.ticket = count()
        self.paced = 0.0
        self.unsent_turns = self.open_sessions = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.stop_at = float("inf")
        self.sent = 0
        self.refused = False
        self.over = asyncio.Event()
        self.sessions = laps(level.sessions) if level.repeat else iter(level.sessions)

    async def prepare(self) -> None:
        """Make the requests and open the connections."""
        size = 0
        for session in islice(self.sessions, self.level.slots):
            call = Call(Conversation(session, self.prompts))
            if size < PREBUILT_BYTES:
                size += self._build(call)
            self.due.append((-session.arrival_s, -next(self.ticket), call))
        if not self.target.cold_connects:
            gate = asyncio.Semaphore(CONNECTS_AT_ONCE)
            await asyncio.gather(*(self._spare(gate) for _ in range(self.level.streams())))

    def _build(self, call: Call) -> int:
        talk = call.conversation
        talk.ask()
        call.data = request_bytes(self.target, talk.messages, call.asked.output_len, talk.name)
        return len(call.data)

    async def _spare(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                if not self.refused:
                    self.idle.append(await asyncio.wait_for(self.connector.open(), CONNECT_TIMEOUT_S))
            except (OSError, TimeoutError):
                self.refused = True  # a request that lacks one opens its own, and tells why not

    def start(self, t0: float) -> None:
        """Begin the schedule at monotonic time t0."""
        if self.level.duration_s is not None:
            self.stop_at = t0 + self.level.duration_s
        self.open_sessions = len(self.due)
        self.due = sorted((minus_at - t0, ticket, call) for minus_at, ticket, call in self.due)
        self._sleep(-self.due[-1][0] - monotonic())
        self.loop.call_later(PROBE_PERIOD_S, self._probe, monotonic() + PROBE_PERIOD_S)

    def _at(self, when: float, call: Call) -> None:
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
        now = monotonic()
        self.paced = max(self.paced, now - CATCH_UP_S)
        allowed = min(SENDS_PER_ROUND, int((now - self.paced) / self.level.send_gap_s))
        while self.due and self.due[-1][0] >= -now:
            if not allowed:
                self._sleep(LOOP_GRAIN_S if now - self.paced < LOOP_GRAIN_S else 0)
                return
            allowed -= 1
            self.paced += self.level.send_gap_s
            minus_when, _, call = self.due.pop()
            call.scheduled = call.due = -minus_when
            self._launch(call)
        if self.due:
            self._sleep(-self.due[-1][0] - now)

    def _launch(self, call: Call) -> None:
        cap = self.level.max_concurrency
        if cap is not None and len(self.in_flight) >= cap:
            self.waiting.append(call)
            return
        if not call.data:
            self._build(call)
        while self.idle:
            connection = self.idle.popleft()
            if connection.open:
                self._send(connection, call)
                return
        self._send_on_new(call)

    def _send(self, connection: Connection, call: Call) -> None:
        self.in_flight[call] = connection
        self.sent += 1
        if self.sent == self.level.turns:
            self.stop_at = monotonic()
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

    def lost(self, connection: Connection, call: Call) -> None:
        """The connection closed before an answer (retried once if reused) or within one."""
        if connection.used > 1 and not call.answered and not call.retried:
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
        self.recorder.finished.append(call)
        conversation.over = conversation.last or reason is not None
        if reason is None and not conversation.last:
            conversation.answered("".join(call.parser.text or []), call.parser.usage.get("total_tokens"))
        elif not conversation.last:
            self.unsent_turns += len(conversation.session.turns) - call.turn - 1
        children = turn.children if reason is None else ()
        conversation.children_left = len(children)
        for child in children:
            self._at(end + child.arrival_s, Call(Conversation(child, self.prompts, conversation)))
        if not children:
            self._go_on(conversation, end)

    def _go_on(self, conversation: Conversation, end: float) -> None:
        """A turn and all its children are over: the next turn, or the end of the session."""
        parent = conversation.parent
        pause = conversation.session.turns[conversation.turn - 1].pause_after_s
        if not conversation.over and end + pause < self.stop_at:
            self._at(end + pause, Call(conversation))
        elif parent is not None:
            parent.children_left -= 1
            if not parent.children_left:
                self._go_on(parent, end)
        else:
            self._next_session(end)

    def _next_session(self, end: float) -> None:
        """A session is over: a slot takes the next, and without any the level is over."""
        following = next(self.sessions, None) if end < self.stop_at else None
        if following is not None:
            self._at(end, Call(Conversation(following, self.prompts)))
            return
        self.open_sessions -= 1
        if not self.open_sessions:
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
            connection.close()
            call.parse()
            self._finish(call, "timeout", now)
        if not self.over.is_set():
            self.loop.call_later(PROBE_PERIOD_S, self._probe, now + PROBE_PERIOD_S)
