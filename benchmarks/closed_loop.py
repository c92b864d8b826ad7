"""A benchmark's load on one replica, fast: which steps run, and what part of mean TTFT and TPOT each is.

The fit needs this schedule for some 1,500 measurements several times over. It is the simulator's
scheduling without prefix cache, preemption and blocks; `tests/test_predict.py` compares the two.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TURNAROUND_S = 0.003  # client: from the last token of an answer to the next request
BINS = 12  # kinds of steps that are kept apart, of those with prefill and of those without


@dataclass
class Load:
    """What comes: streams of a closed loop, or arrivals; lengths spread uniformly by a fraction."""

    streams: int
    isl: int
    osl: int
    spread: float
    total: int
    arrivals: list[float] | None = None


@dataclass
class Limits:
    """What the replica allows in one step and at once."""

    budget: int
    rows: int
    mixed: bool


class Play:
    """One run; `steps` holds (start, end, new, pairs, reads, rows, context, repeats)."""

    def __init__(self, step_s: Callable[..., float], line: Callable[[int], tuple[float, float]], load: Load,
                 limits: Limits) -> None:  # fmt: skip
        self.step_s, self.line, self.load, self.limits = step_s, line, load, limits
        rng = random.Random(0)
        size = lambda x: max(1, round(x * rng.uniform(1 - load.spread, 1 + load.spread)))  # noqa: E731
        self.isl = [size(load.isl) for _ in range(load.total)]
        self.osl = [max(2, size(load.osl)) for _ in range(load.total)]
        self.arrival, self.first, self.end = [], [0.0] * load.total, [0.0] * load.total
        self.steps: list[tuple[float, ...]] = []
        self.coming = deque(load.arrivals or [0.0] * min(load.streams, load.total))
        self.waiting: deque[int] = deque()
        self.ends: list[tuple[int, int]] = []
        self.now, self.clock, self.rows, self.context = 0.0, 0, 0, 0
        self.partial: int | None = None
        self.done = 0
        self._run()

    def _run(self) -> None:
        finished = 0
        while finished < self.load.total:
            while self.coming and self.coming[0] <= self.now:
                self.waiting.append(len(self.arrival))
                self.arrival.append(self.coming.popleft())
            chunks, first = self._chunks()
            if chunks:
                self._mixed(chunks)
            elif self.rows:
                self._decode()
            else:
                self.now = self.coming[0]
                continue
            finished += self._finish(first)

    def _chunks(self) -> tuple[list[tuple[int, int]], list[int]]:
        budget = self.limits.budget - (self.rows if self.limits.mixed else 0)
        running, chunks, first = self.rows, [], []
        while budget > 0:
            if self.partial is None:
                if not self.waiting or running >= self.limits.rows:
                    break
                self.partial, self.done = self.waiting.popleft(), 0
            running += 1
            tokens = min(budget, self.isl[self.partial] - self.done)
            chunks.append((tokens, self.done))
            budget -= tokens
            self.done += tokens
            if self.done == self.isl[self.partial]:
                first.append(self.partial)
                self.partial = None
        return chunks, first

    def _mixed(self, chunks: list[tuple[int, int]]) -> None:
        new = sum(tokens for tokens, _ in chunks)
        pairs = sum(tokens * (before + (tokens + 1) / 2) for tokens, before in chunks)
        reads = sum(before for _, before in chunks)
        rows = self.rows if self.limits.mixed else 0
        context = self.context + rows if rows else 0
        self._add(self.step_s(new, pairs, reads, rows, context), new, pairs, reads, rows, context, 1)
        if rows:
            self.clock += 1
            self.context += rows

    def _decode(self) -> None:
        base, slope = self.line(self.rows)
        first, more = base + slope * (self.context + self.rows), slope * self.rows
        steps = self.ends[0][0] - self.clock
        if self.coming:
            until, count, spent = self.coming[0] - self.now, 1, first
            while count < steps and spent < until:
                spent += first + more * count
                count += 1
            steps = count
        spent = steps * first + more * steps * (steps - 1) / 2
        self._add(spent, 0, 0.0, 0, self.rows, self.context + self.rows * (steps + 1) / 2, steps)
        self.clock += steps
        self.context += steps * self.rows

    def _add(self, seconds: float, *what: float) -> None:
        self.steps.append((self.now, self.now + seconds, *what))
        self.now += seconds

    def _finish(self, first: list[int]) -> int:
        count = 0
        while self.ends and self.ends[0][0] <= self.clock:
            request = heapq.heappop(self.ends)[1]
            self.rows -= 1
            self.context -= self.isl[request] + self.osl[request]
            self.end[request] = self.now
            count += 1
            if self.load.arrivals is None and len(self.arrival) + len(self.coming) < self.load.total:
                self.coming.append(self.now + TURNAROUND_S)
        for request in first:
            self.first[request] = self.now
            self.rows += 1
            self.context += self.isl[request] + 1
            heapq.heappush(self.ends, (self.clock + self.osl[request] - 1, request))
        return count

    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (new, pairs, reads, rows, context, weight) whose weighted step times are mean TTFT and TPOT."""
        steps = np.array(self.steps)
        arrival, first, end = np.array(self.arrival), np.array(self.first), np.array(self.end)
        each = np.full(len(arrival), 1 / len(arrival))
        return (
            _merge(steps, _cover(steps, arrival, first, each)),
            _merge(steps, _cover(steps, first, end, each / (np.array(self.osl) - 1))),
        )


def _cover(steps: np.ndarray, begin: np.ndarray, stop: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weight of the requests whose window covers each step; a step under way at the begin counts in part."""
    start, end = steps[:, 0], steps[:, 1]
    i, j = (np.searchsorted(end, at + 1e-12, "right") for at in (begin, stop))
    change = np.zeros(len(steps) + 1)
    np.add.at(change, i, weight)
    np.add.at(change, j, -weight)
    covered = np.cumsum(change[:-1])
    inside = np.minimum(i, len(steps) - 1)
    part = np.clip(begin - start[inside], 0, None) / (end - start)[inside]
    np.add.at(covered, inside, -np.where(i < len(steps), part, 0) * weight)
    return covered


def _merge(steps: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """About 2 x BINS groups of like steps with their weighted means."""
    weight = weight * steps[:, 7]
    keep = weight > weight.sum() * 1e-9
    what, weight = steps[keep][:, 2:7], weight[keep]
    groups = []
    for prefill in (True, False):
        chosen = (what[:, 0] > 0) == prefill
        if not chosen.any():
            continue
        x, w = what[chosen], weight[chosen]
        order = np.argsort(x[:, 0] + x[:, 1] / 1e4 + x[:, 3] * (1 if prefill else 1e3) + x[:, 4] / 1e4)
        x, w = x[order], w[order]
        label = np.minimum(((np.cumsum(w) - w / 2) / w.sum() * BINS).astype(int), BINS - 1)
        for one in np.unique(label):
            mine = label == one
            groups.append(np.append((x[mine] * w[mine, None]).sum(0) / w[mine].sum(), w[mine].sum()))
    return np.array(groups)
