"""Intervals between tokens, counted exactly into bins one per cent wide."""

from bisect import bisect_left, bisect_right
from itertools import accumulate


class IntervalHistogram:
    """Token intervals by length in integer ticks; a run of steps is added in closed form.

    >>> histogram = IntervalHistogram(10**6)
    >>> histogram.add_run(first=10_000, step=100, steps=101, weight=2)
    >>> sum(histogram.counts), round(histogram.percentile_s(50), 4)
    (202, 0.015)
    """

    def __init__(self, ticks_per_s: int) -> None:
        self.ticks_per_s = ticks_per_s
        self.edges = [0, *(int(ticks_per_s * 1e-6 * 1.01**i) for i in range(2100)), 1 << 100]
        self.counts = [0] * len(self.edges)

    def add_run(self, first: int, step: int, steps: int, weight: int) -> None:
        """Add `weight` intervals for each of first, first + step, ... (`steps` of them)."""
        edges, counts = self.edges, self.counts
        index, done = bisect_right(edges, first), 0
        while done < steps:
            upto = steps if step == 0 else min(steps, -((first - edges[index]) // step))
            counts[index] += (upto - done) * weight
            done = upto
            index += 1

    def percentile_s(self, percent: float) -> float | None:
        """The percentile in seconds, within one per cent; None when nothing was added."""
        below = list(accumulate(self.counts))
        if not below[-1]:
            return None
        rank = below[-1] * percent / 100
        index = bisect_left(below, rank)
        low, high = self.edges[index - 1 : index + 1]
        return (low + (high - low) * (rank - below[index - 1]) / self.counts[index]) / self.ticks_per_s
