"""One engine in virtual time: the step, or the run of equal decode steps, that it is in."""

from bisect import bisect_left

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
        self.arriving = 0  # requests that API and tokeniser still have
        self.backlog_tokens = 0  # prompt tokens sent here and not computed yet
        self.usage_area = self._sampled_at = self._sampled = 0  # blocks x ticks, for the mean
        self._stall = self._stalled_rows = 0  # decode rows that wait behind prefill-only steps

    def plan(self, now: int, *, step_by_step: bool = False) -> Batch | None:
        """Start the next step or run of steps now; None when there is nothing to do."""
        self.pending = False
        batch = self.batch = self.scheduler.plan()
        if batch is not None:
            self.start = now
            self.first, self.slope = self.clock.ticks(batch)
            self._end_after(1 if step_by_step else self.scheduler.horizon(batch))
        return batch

    def _end_after(self, steps: int) -> None:
        self.steps, self.end = steps, self.start + self.ticks(steps)
        self.version += 1

    def ticks(self, steps: int) -> int:
        """Length of the first `steps` of the run."""
        return steps * self.first + self.slope * steps * (steps - 1) // 2

    def steps_until(self, now: int) -> int:
        """The step of the run that is under way, or just ending, at `now`, counted from 1."""
        return bisect_left(range(self.steps + 1), now - self.start, lo=1, key=self.ticks)

    def shorten(self, now: int) -> bool:
        """End the run with the step under way, so that a newcomer can join; True if sooner."""
        steps = self.steps_until(now)
        sooner = steps < self.steps
        if sooner:
            self._end_after(steps)
        return sooner

    def catch_up(self, now: int) -> None:
        """Take the blocks of all steps begun so far: what a prefix router sees."""
        if self.steps > 1:
            self.scheduler.grow(min(self.steps, self.steps_until(now)))

    def cut(self, now: int, intervals: IntervalHistogram) -> None:
        """Stop in the middle: count the steps of the run that ended before `now`."""
        self.catch_up(now)
        if self.steps > 1 and (done := self.steps_until(now) - 1):
            self._end_after(done)
            self.finish(intervals)

    def finish(self, intervals: IntervalHistogram) -> tuple[list[Request], list[Request]]:
        """End the run at `end`: requests with their first token, and finished ones."""
        batch = self.batch
        assert batch is not None
        if batch.decodes:
            self._count_intervals(intervals, batch.decodes)
        elif self.scheduler.decodes:
            self._stalled_rows = self._stalled_rows or self.scheduler.decodes
            self._stall += self.first
        first, finished = self.scheduler.commit(batch, self.steps)
        self.steps = 0
        self.backlog_tokens -= sum(tokens for _, tokens, _ in batch.chunks)
        if batch.chunks or finished:
            used = self.scheduler.pool.used
            self.usage_area += (self._sampled + used) * (self.end - self._sampled_at)
            self._sampled, self._sampled_at = used, self.end
        return first, finished

    def _count_intervals(self, intervals: IntervalHistogram, rows: int) -> None:
        first, steps = self.first, self.steps
        if self._stall:  # the first interval of rows that waited is longer
            stalled = min(rows, self._stalled_rows)
            intervals.add_run(first + self._stall, 0, 1, stalled)
            intervals.add_run(first, 0, 1, rows - stalled)
            first, steps = first + self.slope, steps - 1
            self._stall = self._stalled_rows = 0
        intervals.add_run(first, self.slope, steps, rows)

    def kv_cache_usage_mean(self, now: int) -> float:
        """Mean fraction of KV blocks held by requests from the start to `now`, both in ticks."""
        area = self.usage_area + 2 * self._sampled * (now - self._sampled_at)
        return area / (2 * self.scheduler.pool.total * max(now, 1))

    @property
    def load(self) -> int:
        """Requests here: running, waiting or arriving."""
        return len(self.scheduler.running) + len(self.scheduler.waiting) + self.arriving

    def left_with(self, request: Request, now: int) -> tuple[int, int]:
        """Prompt tokens left to compute here, less what the request finds in the cache; the load."""
        self.catch_up(now)
        hit = self.scheduler.pool.match(request.path) * self.scheduler.config.block_size
        return self.backlog_tokens - hit, self.load
