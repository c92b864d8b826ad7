"""When sessions arrive: the processes of a workload file.

`times(rng)` of each is an iterator of arrival times in seconds, ascending, endless but for a burst or a trace.
"""

from collections.abc import Iterator
from functools import cache
from itertools import count
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kit.workload.distribution import Distribution, Model

Rate = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]


class Process(Model):
    """Common to all: the mean rate, and how it is scaled to a window."""

    def mean_rate_per_s(self) -> float | None:
        """Long-run arrivals per second; None where only a count is defined."""
        return getattr(self, "rate_per_s", None)

    def scaled(self, factor: float) -> Self:
        """The same process with every rate multiplied."""
        return self.model_copy(update={"rate_per_s": (self.mean_rate_per_s() or 0.0) * factor})

    def within(self, duration_s: float, sessions: int | None) -> Self:
        """The process for a window from 0; `sessions`, if given, are expected in it."""
        rate = self.mean_rate_per_s()
        if sessions is None or rate is None:
            return self
        return self.scaled(sessions / duration_s / rate)


class Renewal(Process):
    """Independent gaps: `constant`, `poisson`, or `gamma` with coefficient of variation `cv`."""

    kind: Literal["constant", "poisson", "gamma"]
    rate_per_s: Rate
    cv: float = Field(1.0, gt=0)

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        cv, now = 1.0 if self.kind == "poisson" else self.cv, 0.0
        while True:
            gaps = np.full(1024, 1 / self.rate_per_s)
            if self.kind != "constant":
                gaps = rng.gamma(1 / cv**2, cv**2 / self.rate_per_s, 1024)
            times = now + np.cumsum(gaps)
            yield from times.tolist()
            now = float(times[-1])


class State(Model):
    """A state of a modulated process; rate 0 is exactly silent."""

    rate_per_s: Seconds
    hold_s: Distribution
    next: list[float] | None = None  # weights of the following state; None: the next in the list


class Mmpp(Process):
    """Poisson arrivals whose rate is that of the current state, first state first; `on_off` has two."""

    kind: Literal["mmpp", "on_off"]
    states: list[State] = Field(min_length=1)

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        size, busy = len(self.states), [state.rate_per_s > 0 for state in self.states]
        weights = [state.next for state in self.states if state.next is not None]
        if any(len(row) != size or min(row) < 0 or not sum(row) for row in weights):
            raise ValueError(f"next needs {size} weights, one for each state")
        if not any(busy):
            raise ValueError("every state is silent")
        if self.kind == "on_off" and sorted(busy) != [False, True]:
            raise ValueError("on_off needs two states, one of them with rate_per_s 0")
        return self

    def _transitions(self) -> NDArray[np.float64]:
        following = np.roll(np.eye(len(self.states)), 1, axis=1)
        rows = np.array([f if s.next is None else s.next for s, f in zip(self.states, following, strict=True)])
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))

    def mean_rate_per_s(self) -> float:
        size = len(self.states)
        equations = np.vstack([self._transitions().T - np.eye(size), np.ones(size)])
        visits = np.linalg.lstsq(equations, np.r_[np.zeros(size), 1.0], rcond=None)[0]
        held = visits * [state.hold_s.average() for state in self.states]
        return float(held @ [state.rate_per_s for state in self.states] / held.sum())

    def scaled(self, factor: float) -> Self:
        states = [s.model_copy(update={"rate_per_s": s.rate_per_s * factor}) for s in self.states]
        return self.model_copy(update={"states": states})

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        transitions, now, index = self._transitions(), 0.0, 0
        while True:
            state = self.states[index]
            hold = float(state.hold_s.sample(rng, 1)[0])
            if state.rate_per_s:
                arrivals = rng.poisson(state.rate_per_s * hold)
                yield from (now + np.sort(rng.random(arrivals)) * hold).tolist()
            now += hold
            index = int(rng.choice(len(self.states), p=transitions[index]))


@cache
def _concentration(peak_to_mean: float) -> float:
    """k of the wave exp(k cos), whose peak over mean is exp(k) / I0(k)."""
    ks = np.linspace(0, 700, 70_001)
    return float(np.interp(peak_to_mean, np.exp(ks) / np.i0(ks), ks))


class Diurnal(Process):
    """Poisson with a daily wave: `peak_to_mean` times the mean rate at `peak_at_s`."""

    kind: Literal["diurnal"]
    rate_per_s: Rate
    peak_to_mean: float = Field(ge=1)
    peak_at_s: Seconds = 50_400.0
    period_s: Rate = 86_400.0

    def within(self, duration_s: float, sessions: int | None) -> Self:
        """As for all; a window shorter than the period is that around the peak."""
        wave = self if duration_s >= self.period_s else self.model_copy(update={"peak_at_s": duration_s / 2})
        if sessions is None:
            return wave
        share = wave._wave(np.linspace(0, duration_s, 10_001)).mean() * wave.peak_to_mean
        return wave.scaled(sessions / duration_s / (wave.rate_per_s * float(share)))

    def _wave(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rate over peak rate, positive at any ratio of peak to mean."""
        k = _concentration(self.peak_to_mean)
        phase = 2 * np.pi * (times - self.peak_at_s) / self.period_s
        return np.asarray(np.exp(k * (np.cos(phase) - 1)))

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        peak, now = self.rate_per_s * self.peak_to_mean, 0.0
        while True:
            times = now + np.cumsum(rng.exponential(1 / peak, 1024))
            yield from times[rng.random(1024) < self._wave(times)].tolist()
            now = float(times[-1])


class Burst(Process):
    """`size` sessions within `over_s` (0: at once): a `step` from nothing, a repeated `batch`."""

    kind: Literal["step", "batch"]
    size: int = Field(ge=1)
    at_s: Seconds = 0.0
    over_s: Seconds = 0.0
    every_s: Rate | None = None

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        for start_s in count(self.at_s, self.every_s or 0.0):
            yield from (start_s + np.arange(self.size) * self.over_s / self.size).tolist()
            if self.every_s is None:
                return


class Recorded(Process):
    """The arrival times of a trace file."""

    kind: Literal["trace"]
    file: str
    format: str

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        from kit.traces import read

        yield from (session.arrival_s for session in read(self.file, self.format).sessions())


Arrivals = Annotated[Renewal | Mmpp | Diurnal | Burst | Recorded, Field(discriminator="kind")]
