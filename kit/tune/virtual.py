"""A machine in virtual time: the engine as modelled, or the hidden one of a seed, measured in a second of CPU time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kit.catalog import GpuSpec, ModelSpec
from kit.emulator import hide
from kit.engine_config import EngineConfig
from kit.scheduler import StepTime
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig, replica
from kit.simulator.answers import as_requests, columns, judged
from kit.tune.levels import LONGEST_S, Boot, Goal, Level, Store, cut_short, judge
from kit.tune.load import Offer
from kit.tune.search import Setup, tune


class VirtualMachine:
    """`tune`'s machine on the simulator; with `truth`, the hidden machine of that seed."""

    def __init__(
        self, model: ModelSpec, gpu: GpuSpec, config: EngineConfig, offer: Offer, goal: Goal, truth: int | None = None
    ) -> None:
        self.parts, self.config, self.offer, self.goal, self.truth = (model, gpu), config, offer, goal, truth
        self.steps: StepTime
        self.spent_s = 0.0  # virtual time of all levels

    def boot(self, flags: Mapping[str, Any], index: int) -> Boot:
        """An engine with these flags; the KV pool is what memory leaves beside them."""
        self.limits, self.steps, _ = replica(*self.parts, replace(self.config, **flags))
        if self.truth is not None:
            self.limits, self.steps = hide(self.truth, self.limits, self.steps)
        return Boot(index, dict(flags), self.limits.max_num_seqs, self.limits.kv_blocks * self.limits.block_size)

    def closed_loop(self, boot: Boot, concurrency: int, seed: int, min_turns: int) -> Level:
        """`concurrency` turns always ready, until `min_turns` can be judged."""
        turns = min_turns + 2 * concurrency
        sim = Simulation(SimulationConfig(self.limits, warm=True), self.steps, LONGEST_S, turns)
        sim.run(self.offer.ready(concurrency, seed, turns))
        return self._level(boot, "closed", seed, sim, concurrency)

    def open_loop(self, boot: Boot, seed: int, max_concurrency: int | None = None) -> Level:
        """The workload with its burst. A cap in the client lets in what a scheduler with that limit would."""
        limits = replace(self.limits, max_num_seqs=min(boot.max_num_seqs, max_concurrency or boot.max_num_seqs))
        sim = Simulation(SimulationConfig(limits, warm=True), self.steps, self.offer.duration_s)
        return self._level(boot, "open", seed, sim.run(self.offer.arriving(seed)), max_concurrency)

    def _level(self, boot: Boot, kind: str, seed: int, sim: Simulation, concurrency: int | None) -> Level:
        turns, pool, span_s = columns(sim), sim.replicas[0].scheduler, sim.now / TICKS_PER_S
        rows = judged(sim, turns, None)
        self.spent_s += span_s
        server = {
            "running_mean": float((turns["end_s"] - turns["admitted_s"]).sum() / span_s),
            "kv_cache_usage_mean": sim.replicas[0].kv_cache_usage_mean(sim.now),
            "kv_cache_usage_max": pool.peak_used / pool.pool.total,
            "preemptions": pool.preemptions,
            "prefix_hit_fraction": pool.hit_tokens / pool.query_tokens if pool.query_tokens else None,
        }
        warnings = cut_short(sim.left, span_s) if kind == "closed" else ()
        measured = as_requests(rows, span_s), np.nan_to_num(rows["input_len"])
        return judge(boot, kind, seed, *measured, self.goal, server, concurrency, warnings)


def expected(setup: Setup, offer: Offer, goal: Goal) -> int | None:
    """max_num_seqs by the same search on the modelled machine; None where the goal is out of its reach."""
    machine = VirtualMachine(setup.model, setup.gpu, setup.config, offer, goal)
    return tune(machine, setup, goal, Store(None, {}), max_boots=1).recommended.get("max_num_seqs")
