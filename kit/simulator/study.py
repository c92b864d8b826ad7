"""One question to the simulator: which sessions, on which replicas, judged by which limits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import merge
from itertools import islice, repeat, takewhile
from math import inf
from time import perf_counter
from typing import Any

import numpy as np

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.memory import plan
from kit.scheduler import SchedulerConfig, StepTime, scheduler_config
from kit.simulator.answers import answers, columns, largest_passing_burst
from kit.simulator.loop import Simulation, SimulationConfig
from kit.simulator.steps import TICKS_PER_S
from kit.steptime import Fitted, fitted, step_time
from kit.steptime import StepTime as FittedSteps
from kit.traces import Trace
from kit.workload import Session, Workload, generate
from kit.workload.arrivals import Burst

DEFAULT_DURATION_S = 3600.0
BURST_KEYS = 1 << 40  # session keys of a burst


@dataclass(frozen=True, slots=True)
class Load:
    """What arrives: a workload or a trace, how much of it, and a burst on top."""

    source: Workload | Trace
    sessions: int | None = None
    duration_s: float | None = None
    burst: int | None = None
    seed: int = 0

    def stream(self) -> tuple[Iterable[Session], set[int]]:
        """Sessions by arrival, and the keys of those that are the burst.

        A burst alone comes at 0; with other load it comes at half of the duration.
        """
        if not self.burst:
            return self._base(), set()
        alone = self.sessions is None and self.duration_s is None
        at_s = 0.0 if alone else (self.duration_s or DEFAULT_DURATION_S) / 2
        burst = [replace(one, key=BURST_KEYS + one.key, arrival_s=at_s) for one in self._at_once(self.burst)]
        load = burst if alone else merge(self._base(), burst, key=lambda session: session.arrival_s)
        return load, {session.key for session in burst}

    def first_turns(self, count: int) -> list[Session]:
        """First turns of `count` sessions (fewer where a trace has fewer), to be sent at once."""
        return [replace(one, turns=[replace(one.turns[0], children=())]) for one in self._at_once(count)]

    def warnings(self) -> list[str]:
        """What the trace does not say or leaves out."""
        if isinstance(self.source, Workload):
            return []
        notes = [f"{self.source.skipped} recorded calls without output were left out"] * (self.source.skipped > 0)
        clock = "the trace has no common clock: session starts are spread evenly at random"
        return notes + [clock] * (not self.source.shared_clock)

    def _base(self) -> Iterator[Session]:
        if isinstance(self.source, Workload):
            ends = self.sessions is not None or isinstance(self.source.arrivals, Burst)
            duration_s = self.duration_s or (None if ends else DEFAULT_DURATION_S)
            return generate(self.source, self.seed, sessions=self.sessions, duration_s=duration_s)
        starts = None
        if not self.source.shared_clock:
            rng = np.random.default_rng([self.seed, 0])
            spread = rng.random(len(self.source.calls)) * (self.duration_s or DEFAULT_DURATION_S)
            starts = iter(np.sort(spread).tolist())
        every = islice(self.source.sessions(starts), self.sessions)
        return takewhile(lambda s: self.duration_s is None or s.arrival_s < self.duration_s, every)

    def _at_once(self, count: int) -> list[Session]:
        """`count` sessions at 0; a burst on top draws others than the base load."""
        if isinstance(self.source, Workload):
            rngs = [np.random.default_rng([self.seed, 2, key]) for key in range(count)]
            return [self.source.session.draw(rng, key, 0.0) for key, rng in enumerate(rngs)]
        return list(islice(self.source.sessions(repeat(0.0)), count))


def replica(
    model: ModelSpec, gpu: GpuSpec, config: EngineConfig, basis: Fitted | None = None
) -> tuple[SchedulerConfig, FittedSteps, list[str]]:
    """Scheduler limits, step time and warnings of one replica; `basis` of a calibration."""
    resolved = resolve(config, model, gpu)
    basis = basis or fitted(model, gpu, resolved)
    tokens = int(plan(model, gpu, resolved).kv_cache_tokens() * basis.kv_cache_factor)
    if tokens < resolved.block_size:
        cards = f"{resolved.gpu_count} x {gpu.key}"
        raise UserError(f"{model.key} leaves no room for a KV cache on {cards}: see kit size for what would fit")
    return scheduler_config(resolved, tokens), step_time(model, gpu, resolved, basis), list(basis.warnings)


def study(
    config: SimulationConfig, step_time: StepTime, load: Load, slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None, basis: Fitted | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answers of one simulation and the largest passing burst, with the seconds it took; intervals from a basis."""
    begun = perf_counter()
    sessions, burst_keys = load.stream()
    sim = Simulation(config, step_time).run(sessions)
    result = answers(sim, slo_ttft_s, slo_tpot_s, burst_keys)
    if basis is not None:
        result["intervals"] = basis.intervals(result, _came_tokens_per_s(sim))
    result["warnings"] = load.warnings() + ["no session arrived within the duration"] * (not sim.planned)
    if slo_ttft_s is not None:
        cut = replace(config, until_s=slo_ttft_s + config.ready_after_s)
        result["burst"]["largest_passing_burst"] = largest_passing_burst(
            lambda first_turns: Simulation(cut, step_time).run(first_turns), load.first_turns
        )
    result["wall_s"] = perf_counter() - begun
    return result


def _came_tokens_per_s(sim: Simulation) -> float:
    """Output tokens that were asked for, over the seconds in which they were: what no machine can exceed."""
    turns, under_way = columns(sim), sim.in_flight.values()
    tokens = turns["output_len"].sum() + sum(request.output_len for request in under_way)
    last_s = max([*turns["arrival_s"], *(request.times[0] / TICKS_PER_S for request in under_way)], default=0.0)
    return float(tokens / last_s) if last_s else inf
