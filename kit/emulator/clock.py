"""The scheduler on the real clock: a step ends at its absolute time, and then all its tokens go out."""

import asyncio
import sys
from heapq import heappop, heappush
from itertools import count
from time import monotonic
from typing import Any

from kit.emulator.page import Page
from kit.scheduler import Batch, Request, Scheduler, SchedulerConfig, StepTime

NEVER = float("inf")
SPIN_S = 0.002  # event-loop timers are a millisecond coarse: the last of a wait is spent polling
LATE_S, TELL_EVERY_S = 0.02, 10.0  # what is said on stderr
GIVEN_UP_S = 0.25  # a clock that is further behind moves on instead of running after the time
PACED_AT_ONCE = 256  # tokens between looks at what arrives
COUNTED = "stop", "length", "abort", "refused", "prompt_tokens", "generation_tokens"


class Clock:
    """Runs a scheduler's steps in real time. A request's owner gets its tokens (`token(last)`); none: it has left."""

    def __init__(self, limits: SchedulerConfig, times: StepTime, page: Page, loop: Any = None) -> None:
        self.scheduler, self.step_time, self.page = Scheduler(limits), times, page
        self.loop: asyncio.AbstractEventLoop = loop or asyncio.get_running_loop()
        self.end, self.free, self.told_late = NEVER, 0.0, 0.0  # end of the step under way, of the one before
        self.batch: Batch | None = None
        self.request_s = getattr(times, "request_s", lambda *_: 0.0)  # API and tokeniser, before the queue
        self.coming: list[tuple[float, int, Any]] = []  # calls that these two still have, by when they are done
        self.order = count()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.timer: asyncio.Handle | None = None

    def submit(self, call: Any, arrival: float) -> str | None:
        """Queue a call that arrived then; a text says why it is refused."""
        if refusal := self.scheduler.refusal(call, len(self.coming)):
            return refusal
        at_once = 1 + sum(map(len, (self.scheduler.running, self.scheduler.waiting, self.coming)))
        ready = arrival + self.request_s(call.input_len, at_once)
        call.times = [arrival, ready]  # the second becomes the wait; then: first and latest token
        heappush(self.coming, (ready, next(self.order), call))
        if self.coming[0][2] is call:
            self._queue(monotonic())
        return None

    def _queue(self, now: float) -> None:
        """Queue the calls whose time has come, as far as the step under way has not ended before."""
        while self.coming and self.coming[0][0] <= min(now, self.end):
            ready, _, call = heappop(self.coming)
            self.scheduler.queue(call)
            if self.batch is None:
                self._plan(max(ready, self.free))
        self.arm(self.end)

    def cancel(self, call: Request) -> None:
        """Its client left: free what it holds."""
        call.owner = None
        self.counts["abort"] += 1
        self.scheduler.abort(call)
        if self.coming:
            self.coming = sorted(one for one in self.coming if one[2] is not call)

    def poll(self) -> None:
        """End the step if its time has come; callbacks call this so that none of them holds it up."""
        now = monotonic()
        if self.coming and self.coming[0][0] <= now:
            self._queue(now)
        late_s = now - self.end
        if late_s < 0:
            return
        self.page.histograms["late"].add(late_s)
        if late_s > LATE_S and now > self.told_late + TELL_EVERY_S:
            self.told_late = now
            sys.stderr.write(f"kit emulate: {late_s * 1e3:.0f} ms late: too much load for this machine to keep time\n")
        self.step_end(now)

    def arm(self, end: float) -> None:
        """The step ends then: look again shortly before."""
        self.end = end
        if self.timer:
            self.timer.cancel()
        left_s = min(end, self.coming[0][0] if self.coming else NEVER) - monotonic()
        wait = self.loop.call_soon if left_s < SPIN_S else lambda do: self.loop.call_later(left_s - 0.75 * SPIN_S, do)
        self.timer = wait(self._tick) if left_s < NEVER else None

    def _tick(self) -> None:
        self.poll()
        self.arm(self.end)

    def _plan(self, start: float) -> None:
        """Begin the next step at `start`, or be idle."""
        batch = self.batch = self.scheduler.plan()
        for call in batch.admitted if batch else []:
            if not call.preemptions:
                call.times[1] = start - call.times[1]
                if not self.page.queue_time_at_end:
                    self.page.histograms["queue_time"].add(call.times[1])
        chunks = [(tokens, before) for _, tokens, before in batch.chunks] if batch else []
        self.arm(start + self.step_time.step_s(chunks, batch.decodes, batch.context) if batch else NEVER)

    def step_end(self, now: float) -> None:
        """Hand out the tokens of the step and plan the next one from its planned end."""
        assert self.batch is not None
        rows = self.scheduler.decoding() if self.batch.decodes else []
        first, finished = self.scheduler.commit(self.batch)
        over = {call.key for call in finished}
        for call in rows + first:
            self.emit(call, now, call.key in over)
        self.free = max(self.end, now - GIVEN_UP_S)
        self._plan(self.free)

    def emit(self, call: Any, now: float, last: bool) -> None:
        """Count one token and pass it on."""
        owner, (arrival, waited, *before), seconds = call.owner, call.times, self.page.histograms
        if owner is None:
            return
        call.times = [arrival, waited, before[0] if before else now, now]
        seconds["itl" if before else "ttft"].add(now - (before[1] if before else arrival))
        self.counts["prompt_tokens"] += 0 if before else call.input_len
        self.counts["generation_tokens"] += 1
        if last:
            call.owner = None
            seconds["e2el"].add(now - arrival)
            if self.page.queue_time_at_end:
                seconds["queue_time"].add(waited)
            seconds["tpot"].add((now - call.times[2]) / max(1, call.output_len - 1))
        owner.token(last)

    def values(self) -> dict[str, float]:
        """Our quantities for the metrics page, and the requests that ended, by reason."""
        scheduler, asked, hits = self.scheduler, self.scheduler.query_tokens, self.scheduler.hit_tokens
        return {
            **self.counts, "emulated": 1, "lateness_max": self.page.histograms["late"].max,
            "running": len(scheduler.running), "waiting": len(scheduler.waiting) + len(self.coming),
            "preemptions": scheduler.preemptions,
            "prefix_queries": asked, "prefix_hits": hits, "prefix_hit_rate": hits / max(1, asked),
            "kv_cache_usage": scheduler.kv_cache_usage,
            "kv_cache_tokens": scheduler.pool.total * scheduler.config.block_size,
        }  # fmt: skip


class Paced(Clock):
    """No engine: each call has its first token after ttft_s and then one every itl_s, however many there are."""

    def __init__(self, pace_s: tuple[float, float], *parts: Any) -> None:
        super().__init__(*parts)
        self.ttft_s, self.itl_s = pace_s
        self.due: list[tuple[float, int, Request]] = []

    def submit(self, call: Any, arrival: float) -> str | None:
        """Take a call in; nothing is refused."""
        call.times = [arrival, 0.0]
        heappush(self.due, (call.times[0] + self.ttft_s, next(self.order), call))
        self.arm(self.due[0][0])
        return None

    def step_end(self, now: float) -> None:
        """Hand out what is due."""
        for _ in range(PACED_AT_ONCE):
            if not self.due or self.due[0][0] > (now := monotonic()):
                break
            due, _, call = heappop(self.due)
            call.generated += 1
            if call.generated < call.output_len and call.owner is not None:
                heappush(self.due, (due + self.itl_s, next(self.order), call))
            self.emit(call, now, call.generated == call.output_len)
        self.arm(self.due[0][0] if self.due else NEVER)

    def values(self) -> dict[str, float]:
        """As above; every call runs."""
        return super().values() | {"running": len(self.due)}
