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
        self.end, self.told_late = NEVER, 0.0  # end of the step under way
        self.batch: Batch | None = None
        self.counts = dict.fromkeys(COUNTED, 0)
        self.timer: asyncio.Handle | None = None

    def submit(self, call: Any) -> str | None:
        """Queue a call that has just arrived; a text says why it is refused."""
        call.times = [monotonic()]  # then: first and latest token
        refusal = self.scheduler.add(call)
        if refusal is None and self.batch is None:
            self._plan(call.times[0])
        return refusal

    def cancel(self, call: Request) -> None:
        """Its client left: free what it holds."""
        call.owner = None
        self.counts["abort"] += 1
        self.scheduler.abort(call)

    def poll(self) -> None:
        """End the step if its time has come; callbacks call this so that none of them holds it up."""
        now = monotonic()
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
        left_s = end - monotonic()
        wait = self.loop.call_soon if left_s < SPIN_S else lambda do: self.loop.call_later(left_s - 0.75 * SPIN_S, do)
        self.timer = wait(self._tick) if end < NEVER else None

    def _tick(self) -> None:
        self.poll()
        self.arm(self.end)

    def _plan(self, start: float) -> None:
        """Begin the next step at `start`, or be idle."""
        batch = self.batch = self.scheduler.plan()
        for call in batch.admitted if batch else []:
            if len(call.times) == 1:
                self.page.histograms["queue_time"].add(start - call.times[0])
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
        self._plan(max(self.end, now - GIVEN_UP_S))

    def emit(self, call: Any, now: float, last: bool) -> None:
        """Count one token and pass it on."""
        owner, (arrival, *before), seconds = call.owner, call.times, self.page.histograms
        if owner is None:
            return
        call.times = [arrival, before[0] if before else now, now]
        seconds["itl" if before else "ttft"].add(now - (before[1] if before else arrival))
        self.counts["prompt_tokens"] += 0 if before else call.input_len
        self.counts["generation_tokens"] += 1
        if last:
            call.owner = None
            seconds["e2el"].add(now - arrival)
            seconds["tpot"].add((now - call.times[1]) / max(1, call.output_len - 1))
        owner.token(last)

    def values(self) -> dict[str, float]:
        """Our quantities for the metrics page, and the requests that ended, by reason."""
        scheduler, asked, hits = self.scheduler, self.scheduler.query_tokens, self.scheduler.hit_tokens
        return {
            **self.counts, "emulated": 1, "lateness_max": self.page.histograms["late"].max,
            "running": len(scheduler.running), "waiting": len(scheduler.waiting), "preemptions": scheduler.preemptions,
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
        self.order = count()

    def submit(self, call: Any) -> str | None:
        """Take a call in; nothing is refused."""
        call.times = [monotonic()]
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
