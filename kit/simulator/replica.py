"""One engine in virtual time: the step, or the run of equal decode steps, that it is in."""

from math import isqrt

from kit.scheduler import Batch, Request, Scheduler, SchedulerConfig
from kit.simulator.intervals import IntervalHistogram
from kit.simulator.steps import StepClock


class Replica:
    """A scheduler and the end of what it runs now; times in ticks."""

    def __init__(self, index: int, config: SchedulerConfig, clock: StepClock) -> None:
        self.index, self.clock = index, clock
        self.scheduler = Scheduler(config)
        self.batch: Batch | None = None
        self.pending = False  # a plan is due at this instant, or when the replica is ready
        self.start = self.end = self.first = self.slope = self.steps = 0
        self.version = 0  # of the announced end: a shortened run announces a new one
        self.backlog_tokens = 0  # prompt tokens sent here and not computed yet
        self.usage_area = self._sampled_at = self._sampled = 0  # blocks x ticks, for the mean
        self._stall = self._stalled_rows = 0  # decode rows that wait behind prefill-only steps

    def plan(self, now: int, *, step_by_step: bool = False) -> Batch | None:
        """Start the next step or run of steps now; None when there is nothing to do."""
        self.pending = False
        batch = self.batch = self.scheduler.plan()
        if batch is None:
            return None
        if batch.chunks:
            self.first, self.slope, self.steps = self.clock.mixed(batch), 0, 1
        else:
            self.first, self.slope = self.clock.decode(batch)
            self.steps = 1 if step_by_step else self.scheduler.horizon(batch)
        self.start, self.end = now, now + self.ticks(self.steps)
        self.version += 1
        return batch

    def ticks(self, steps: int) -> int:
        """Length of the first `steps` of the run."""
        return steps * self.first + self.slope * steps * (steps - 1) // 2

    def steps_until(self, now: int) -> int:
        """The step of the run that is under way, or just ending, at `now`, counted from 1."""
        wanted = now - self.start
        if self.slope == 0:
            return max(1, -(-wanted // self.first))
        linear = 2 * self.first - self.slope
        root = isqrt(linear * linear + 8 * self.slope * wanted)
        steps = max(1, (root - linear) // (2 * self.slope))
        while self.ticks(steps) < wanted:
            steps += 1
        return steps

    def shorten(self, now: int) -> bool:
        """End the run with the step under way, so that a newcomer can join; True if sooner."""
        steps = self.steps_until(now)
        if steps >= self.steps:
            return False
        self.steps, self.end = steps, self.start + self.ticks(steps)
        self.version += 1
        return True

    def catch_up(self, now: int) -> None:
        """Take the blocks of all steps begun so far: what a prefix router sees."""
        if self.batch is not None and self.steps > 1:
            self.scheduler.grow(min(self.steps, self.steps_until(now)))

    def cut(self, now: int, intervals: IntervalHistogram) -> None:
        """Stop in the middle: count the steps of the run that ended before `now`."""
        self.catch_up(now)
        done = self.steps_until(now) - 1 if self.steps > 1 else 0
        if done:
            self.steps, self.end = done, self.start + self.ticks(done)
            self.finish(intervals)

    def finish(self, intervals: IntervalHistogram) -> tuple[list[Request], list[Request]]:
        """End the run at `end`: requests with their first token, and finished ones."""
        batch = self.batch
        assert batch is not None
        if batch.decodes:
            self._count_intervals(intervals, batch)
        elif self.scheduler.decodes:
            self._stalled_rows = self._stalled_rows or self.scheduler.decodes
            self._stall += self.first
        first, finished = self.scheduler.commit(batch, self.steps)
        self.steps = 0
        self.backlog_tokens -= sum(tokens for _, tokens, _ in batch.chunks)
        if batch.chunks or finished:
            self._sample()
        return first, finished

    def _count_intervals(self, intervals: IntervalHistogram, batch: Batch) -> None:
        first, steps, rows = self.first, self.steps, batch.decodes
        if self._stall:
            stalled = min(rows, self._stalled_rows)
            intervals.add_run(first + self._stall, 0, 1, stalled)
            intervals.add_run(first, 0, 1, rows - stalled)
            first, steps = first + self.slope, steps - 1
            self._stall = self._stalled_rows = 0
        intervals.add_run(first, self.slope, steps, rows)

    def _sample(self) -> None:
        used = self.scheduler.pool.used
        self.usage_area += (self._sampled + used) * (self.end - self._sampled_at)
        self._sampled, self._sampled_at = used, self.end

    def kv_cache_usage_mean(self, now: int) -> float:
        """Mean fraction of KV blocks held by requests from the start to `now`, both in ticks."""
        area = self.usage_area + 2 * self._sampled * (now - self._sampled_at)
        return area / (2 * self.scheduler.pool.total * max(now, 1))

    @property
    def load(self) -> int:
        """Requests here, running or waiting."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)
