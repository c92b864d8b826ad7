"""The scheduler on the real clock: a step ends at its absolute time, and then all its tokens go out."""

import asyncio
import sys
from collections import Counter
from heapq import heappop, heappush
from itertools import count
from time import monotonic
from typing import Any

import numpy as np

from kit.emulator.hidden import Truth
from kit.emulator.page import Page
from kit.scheduler import Batch, Path, Request, Scheduler, SchedulerConfig
from kit.simulator.steps import StepTime

SPIN_S = 0.002  # event-loop timers are a millisecond coarse: the last of a wait is spent polling
LATE_S = 0.02  # said on stderr, at most every 10 s
PACED_AT_ONCE = 256
GIVEN_UP_S = 0.25  # a clock that is further behind moves on instead of running after the time


class Call(Request):
    """A request whose tokens go somewhere; `times` are its arrival, first and last token."""

    __slots__ = ("gone",)

    def __init__(self, key: int, input_len: int, output_len: int, path: Path) -> None:
        super().__init__(key, input_len, output_len, path)
        self.gone = False  # its client left

    def token(self, last: bool) -> None:
        """Called for each token when it is there."""
        raise NotImplementedError


class Clock:
    """Runs a scheduler's steps in real time and counts what happens."""

    def __init__(
        self, config: SchedulerConfig, step_time: StepTime, page: Page, loop: asyncio.AbstractEventLoop,
        truth: Truth | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.scheduler, self.step_time, self.page, self.loop = Scheduler(config), step_time, page, loop
        self.truth, self.rng = truth, np.random.default_rng([seed, 20262])
        self.now = monotonic
        self.end = float("inf")  # of the step under way
        self.batch: Batch | None = None
        self.rows: list[Any] = []
        self.counts = Counter[str]()
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self.timer: asyncio.Handle | None = None
        self.told_late = 0.0
        self.next_stall = self.now() + self.rng.exponential(truth.stall_every_s) if truth else float("inf")

    def submit(self, call: Call) -> str | None:
        """Queue a call that has just arrived; a text says why it is refused."""
        refusal = self.scheduler.add(call)
        call.times = [self.now()]
        if refusal is None and self.batch is None:
            self._plan(call.times[0])
            self.arm()
        return refusal

    def cancel(self, call: Call) -> None:
        """Its client left: free what it holds."""
        call.gone = True
        self.finished["abort"] += 1
        self.scheduler.abort(call)

    def poll(self) -> None:
        """End the step under way if its time has come; busy callbacks call this between their parts."""
        if (now := self.now()) >= self.end:
            self.page.late.add(now - self.end)
            if now - self.end > LATE_S and now > self.told_late + 10:
                self.told_late = now
                sys.stderr.write(f"kit emulate: a step ended {(now - self.end) * 1e3:.0f} ms late: this machine is too "
                                 "slow or too busy for this load, its times are not the model's\n")  # fmt: skip
            self.step_end(now)

    def arm(self) -> None:
        """Be called when the step ends."""
        if self.timer:
            self.timer.cancel()
        left = self.end - self.now()
        if left > SPIN_S:
            self.timer = self.loop.call_later(left - 0.75 * SPIN_S, self._tick) if left < float("inf") else None
        else:
            self.timer = self.loop.call_soon(self._tick)

    def _tick(self) -> None:
        self.poll()
        self.arm()

    def _plan(self, start: float) -> None:
        """Begin the next step at `start`, or be idle."""
        batch = self.batch = self.scheduler.plan()
        if batch is None:
            self.end = float("inf")
            return
        for call in batch.admitted:
            if len(call.times) == 1:
                self.page.histograms["queue_time"].add(start - call.times[0])
        self.rows = self.scheduler.decoding() if batch.decodes else []
        chunks = [(tokens, before) for _, tokens, before in batch.chunks]
        self.end = start + self.step_time.step_s(chunks, batch.decodes, batch.context)
        if self.truth and start >= self.next_stall:
            self.end += self.truth.stall_s
            self.next_stall = start + self.rng.exponential(self.truth.stall_every_s)

    def step_end(self, now: float) -> None:
        """Hand out the tokens of the step and plan the next one from its planned end."""
        assert self.batch is not None
        first, finished = self.scheduler.commit(self.batch)
        over = {call.key for call in finished}
        for call in [*self.rows, *first]:
            self.emit(call, now, call.key in over)
        self._plan(max(self.end, now - GIVEN_UP_S))

    def emit(self, call: Any, now: float, last: bool) -> None:
        """Count one token and pass it on."""
        if call.gone:
            return
        seconds, times = self.page.histograms, call.times
        if len(times) == 1:
            seconds["ttft"].add(now - times[0])
            self.counts["prompt_tokens"] += call.input_len
            times += [now, now]
        else:
            seconds["itl"].add(now - times[2])
            times[2] = now
        self.counts["generation_tokens"] += 1
        if last:
            seconds["e2el"].add(now - times[0])
            if call.output_len > 1:
                seconds["tpot"].add((now - times[1]) / (call.output_len - 1))
        call.token(last)

    def values(self) -> dict[str, float]:
        """Our quantities for the metrics page."""
        scheduler = self.scheduler
        asked, hits = scheduler.query_tokens, scheduler.hit_tokens
        return {
            "running": len(scheduler.running), "waiting": len(scheduler.waiting),
            "kv_cache_usage": scheduler.kv_cache_usage, "preemptions": scheduler.preemptions, "prefix_queries": asked,
            "prefix_hits": hits, "prefix_hit_rate": hits / asked if asked else 0.0, "refused": self.counts["refused"],
            "kv_cache_tokens": scheduler.pool.total * scheduler.config.block_size,
            "prompt_tokens": self.counts["prompt_tokens"], "generation_tokens": self.counts["generation_tokens"],
        }  # fmt: skip


class Paced(Clock):
    """No engine: each call has its first token after ttft_s and then one every itl_s, however many there are."""

    def __init__(self, pace_s: tuple[float, float], *parts: Any) -> None:
        super().__init__(*parts)
        self.ttft_s, self.itl_s = pace_s
        self.due: list[tuple[float, int, Any]] = []
        self.order, self.starting = count(), 0

    def submit(self, call: Call) -> str | None:
        """Take a call in; nothing is refused."""
        call.times = [self.now()]
        self.starting += 1
        heappush(self.due, (call.times[0] + self.ttft_s, next(self.order), call))
        self.end = self.due[0][0]
        self.arm()
        return None

    def cancel(self, call: Call) -> None:
        """Its client left."""
        super().cancel(call)
        self.starting -= len(call.times) == 1

    def step_end(self, now: float) -> None:
        """Hand out what is due, a part at a time so that arrivals come in between."""
        for _ in range(PACED_AT_ONCE):
            if not self.due or self.due[0][0] > (now := self.now()):
                break
            due, _, call = heappop(self.due)
            if call.gone:
                continue
            self.starting -= len(call.times) == 1
            call.generated += 1
            if call.generated < call.output_len:
                heappush(self.due, (due + self.itl_s, next(self.order), call))
            self.emit(call, now, call.generated == call.output_len)
        self.end = self.due[0][0] if self.due else float("inf")

    def values(self) -> dict[str, float]:
        """Our quantities for the metrics page."""
        return super().values() | {"running": len(self.due) - self.starting, "waiting": self.starting}
