"""What one replica serves: attainment, turns in flight and KV use by load, from one simulated ramp."""

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Kind:
    """One replica of a model on a GPU: its measured curves over bins of about 250 turns, and its start-up."""

    gpu: GpuSpec
    gpu_count: int
    scheduler: SchedulerConfig
    step_time: StepTime
    lead_s: tuple[float, float]  # from launch to ready
    turns_per_s: Floats
    attainment: Floats
    in_flight: Floats
    kv_cache_usage: Floats
    e2el_s: float  # mean of a turn
    target_interval: tuple[float, float] | None = None  # of target_per_s, 90 %

    @property
    def target_per_s(self) -> float:
        """Most turns per second of which 95 % meet the SLO; 0 where even the lightest load misses it."""
        return float(self.turns_per_s[self.attainment >= PASSING_ATTAINMENT].max(initial=0.0))

    @property
    def rated_per_s(self) -> float:
        """What fleets are sized by: the target, or where there is none the load from which the queue grows."""
        return self.target_per_s or float(self.turns_per_s[-1])

    def at(self, turns_per_s: float) -> tuple[float, float, float]:
        """Attainment, turns in flight and KV use at that load, the latter two from zero up."""
        columns = (self.attainment, self.in_flight, self.kv_cache_usage)
        good, held, used = (float(np.interp(turns_per_s, self.turns_per_s, column)) for column in columns)
        small = min(1.0, turns_per_s / self.turns_per_s[0])
        return good, held * small, used * small

    def load(self, in_flight: float) -> float:
        """Turns per second that keep so many in flight, read off the curve; in proportion beyond its end."""
        held = np.maximum.accumulate(self.in_flight)
        found = np.interp(in_flight, np.append(0.0, held), np.append(0.0, self.turns_per_s))
        return float(found * max(1.0, in_flight / held[-1]))


def completed(sim: Simulation, slo: dict[str, float | None]) -> pd.DataFrame:
    """Completed turns, COLUMNS and whether each is `good`: within the limits on TTFT and TPOT."""
    turns = pd.DataFrame(np.array(sim.turns).reshape(-1, len(COLUMNS)), columns=list(COLUMNS))
    tpot_s = (turns.end_s - turns.first_s) / (turns.output_len - 1).clip(lower=1)
    good = (turns.first_s - turns.arrival_s <= (slo["ttft_s"] or np.inf)) & (tpot_s <= (slo["tpot_s"] or np.inf))
    return turns.assign(good=good, residence_s=turns.end_s - turns.arrival_s)


def measure(
    scheduler: SchedulerConfig,
    step_time: StepTime,
    workload: Workload,
    slo: dict[str, Any],
    factor: float = 1.0,
    ramp_s: float = RAMP_S,
) -> dict[str, Any]:
    """The curves of a Kind: sessions on a ramp until turns wait ten times the limit, steps `factor` times as long."""
    scaled = SimpleNamespace(
        step_s=lambda *batch: factor * step_time.step_s(*batch),
        decode_line=lambda decodes: tuple(factor * part for part in step_time.decode_line(decodes)),
    )
    sim = Simulation(SimulationConfig(scheduler, warm=True), scaled)
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
    minute = turns.arrival_s // 60
    before = minute.map(minute.value_counts().sort_index().cumsum().shift(fill_value=0))  # minutes are kept whole
    tokens = (turns.input_len + turns.output_len / 2) / (scheduler.kv_blocks * scheduler.block_size)
    grouped = turns.assign(minute=minute, tokens=tokens).groupby(before // BIN_TURNS)
    bins = grouped[["good", "residence_s", "tokens"]].mean().assign(turns=grouped.size(), span=grouped.minute.nunique())
    bins = bins.assign(rate=bins.turns / bins.span / 60)
    bins = bins[bins.rate > 0.9 * bins.rate.cummax()].sort_values("rate")  # not what an overload leaves behind
    held = bins.rate * bins.residence_s
    return {
        "turns_per_s": np.array(bins.rate),
        "attainment": isotonic_regression(bins.good, weights=bins.turns, increasing=False).x,
        "in_flight": np.array(held),
        "kv_cache_usage": np.array((held * bins.tokens).clip(upper=1.0)),
        "e2el_s": float(bins.residence_s.median()),
    }
