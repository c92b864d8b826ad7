"""What one replica serves: attainment, turns in flight and KV use by load, from one simulated ramp."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import isotonic_regression

from kit.catalog import GpuSpec
from kit.metrics import PASSING_ATTAINMENT
from kit.scheduler import SchedulerConfig
from kit.simulator import COLUMNS, TICKS_PER_S, Simulation, SimulationConfig, StepTime
from kit.workload import Session, Workload

Floats = npt.NDArray[np.float64]
RAMP_S = 600.0  # the load grows e-fold in this time: slow against a session
FIRST_PER_S = 0.02  # sessions per second at its start
BIN_TURNS = 250
KV_FULL = 0.8  # of the pool at the heaviest load: then it is what ends a replica's capacity


@dataclass(frozen=True, eq=False)
class Kind:
    """One replica of a model on a GPU: its measured curves over bins of about 250 turns, and its start-up."""

    gpu: GpuSpec
    gpu_count: int
    scheduler: SchedulerConfig
    step_time: StepTime
    lead_s: tuple[float, float]  # from launch to ready
    turns_per_s: Floats  # that come ..
    done_per_s: Floats  # .. and that end: fewer where a queue grows
    attainment: Floats
    in_flight: Floats
    kv_cache_usage: Floats
    e2el_s: float  # mean of a turn
    work: Floats = field(default_factory=lambda: np.ones(1))  # of each turn of a sample over the mean turn's
    factor: float = 1.0  # that holds 90 % of the step time's errors
    slower: Callable[[float], dict[str, Any]] = lambda factor: {}  # curves for steps so many times as long

    @cached_property
    def ends(self) -> tuple["Kind", "Kind"]:
        """It as slow and as fast as the 90 % interval leaves open."""
        return replace(self, **self.slower(self.factor)), replace(self, **self.slower(1 / self.factor))

    @cached_property
    def target_per_s(self) -> float:
        """Most turns per second of which 95 % meet the SLO; 0 where even the lightest load misses it."""
        return float(self.turns_per_s[self.attainment >= PASSING_ATTAINMENT].max(initial=0.0))

    @cached_property
    def rated_per_s(self) -> float:
        """What fleets are sized by: the target, or where there is none the load from which the queue grows."""
        return self.target_per_s or float(self.turns_per_s[-1])

    def held(self, turns_per_s: float) -> float:
        """Turns in flight under a steady load."""
        held, rate, *_ = self._curves
        return float(np.interp(turns_per_s, rate, held))

    def flow(self, in_flight: float) -> tuple[float, float, float]:
        """Turns per second that end while so many are in flight, the attainment of those that come, KV use."""
        held, _, *columns = self._curves
        done, good, used = (float(np.interp(in_flight, held, column)) for column in columns)
        return done, good, used

    def load(self, in_flight: float) -> float:
        """Turns per second that keep so many in flight, in proportion beyond the curve's end."""
        held, rate, *_ = self._curves
        return float(np.interp(in_flight, held, rate) * max(1.0, in_flight / held[-1]))

    @cached_property
    def _curves(self) -> tuple[Floats, ...]:
        """Turns in flight (never less at more load), turns that come, that end, attainment, KV use: from no load up."""
        held = np.maximum.accumulate(self.in_flight)
        columns = held, self.turns_per_s, self.done_per_s, self.attainment, self.kv_cache_usage
        return tuple(np.append(column[0] * (column is self.attainment), column) for column in columns)


def completed(sim: Simulation, slo: dict[str, float | None]) -> pd.DataFrame:
    """Completed turns, COLUMNS and whether each is `good`: within the limits on TTFT and TPOT."""
    turns = pd.DataFrame(np.array(sim.turns).reshape(-1, len(COLUMNS)), columns=list(COLUMNS))
    tpot_s = (turns.end_s - turns.first_s) / (turns.output_len - 1).clip(lower=1)
    good = (turns.first_s - turns.arrival_s <= (slo["ttft_s"] or np.inf)) & (tpot_s <= (slo["tpot_s"] or np.inf))
    return turns.assign(good=good, residence_s=turns.end_s - turns.arrival_s)


def _slower(step_time: StepTime, factor: float) -> Any:
    """Steps `factor` times as long; API and tokeniser as they were."""
    return SimpleNamespace(
        step_s=lambda *batch: factor * step_time.step_s(*batch),
        request_s=getattr(step_time, "request_s", None),
        decode_line=lambda decodes: tuple(factor * part for part in step_time.decode_line(decodes)),
    )


def measure(
    scheduler: SchedulerConfig, step_time: StepTime, workload: Workload, slo: dict[str, Any], tokens: Floats,
    factor: float = 1.0, ramp_s: float = RAMP_S,
) -> dict[str, Any]:  # fmt: skip
    """The curves of a Kind: sessions on a ramp until turns wait ten times the limit, steps `factor` times as long.

    `tokens` that the turns of a sample hold: their work, where a full KV pool is what ends the capacity.
    """
    sim = Simulation(SimulationConfig(scheduler, warm=True), _slower(step_time, factor))
    stopped_s, longest_s = 0.0, max(10.0, 10 * (slo["ttft_s"] or 1.0))

    def ramp() -> Iterator[Session]:
        nonlocal stopped_s
        rng, waiting, grown = np.random.default_rng(3), sim.replicas[0].scheduler.waiting, 0.0
        while not waiting or sim.now - waiting[0].times[0] < longest_s * TICKS_PER_S:
            grown += rng.exponential() / (FIRST_PER_S * ramp_s)
            yield workload.session.draw(rng, 0, ramp_s * float(np.log1p(grown)))
            stopped_s = sim.now / TICKS_PER_S

    turns = completed(sim.run(ramp()), slo)
    turns = turns[turns.arrival_s < stopped_s]
    arrivals, residence_s = np.array(turns.arrival_s), np.array(turns.residence_s)
    before = np.cumsum(np.append(0, np.bincount((arrivals // 60).astype(int))))[:-1]  # minutes are kept whole
    edges_s = np.append(60.0 * np.flatnonzero(np.diff(before // BIN_TURNS, prepend=-1)), stopped_s)
    span_s, count = np.diff(edges_s), np.histogram(arrivals, edges_s)[0]
    turn_s = np.clip(edges_s[:, None] - arrivals, 0, residence_s).sum(axis=1)  # spent in turns until then
    rate, done, held = count / span_s, np.histogram(turns.end_s, edges_s)[0] / span_s, np.diff(turn_s) / span_s
    good = np.histogram(arrivals, edges_s, weights=turns.good.astype(float))[0] / count
    kept = np.flatnonzero(rate > 0.9 * np.maximum.accumulate(rate))  # not what an overload leaves behind
    kept = kept[np.argsort(rate[kept])]
    recent = turns[turns.arrival_s > stopped_s - ramp_s]
    mean_tokens = float((recent.input_len + recent.output_len / 2).mean())
    used = held[kept] * mean_tokens / (scheduler.kv_blocks * scheduler.block_size)
    return {
        "turns_per_s": rate[kept],
        "done_per_s": done[kept],
        "attainment": isotonic_regression(good[kept], weights=count[kept], increasing=False).x,
        "in_flight": held[kept],
        "kv_cache_usage": used.clip(max=1.0),
        "e2el_s": float(np.median(held[kept] / rate[kept])),
        "work": tokens / mean_tokens if used[-1] > KV_FULL else np.ones(len(tokens)),
    }
