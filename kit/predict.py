"""Latency and throughput of one replica under a benchmark's load, with 90 % intervals."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.simulator import Simulation, SimulationConfig, replica
from kit.simulator.answers import answers
from kit.steptime import Fitted, StepTime, fitted, step_time
from kit.workload import Session, Turn

REQUESTS_PER_STREAM = 10
OPEN_LOOP_REQUESTS = 400
TURNAROUND_S = 0.003  # client: from the last token of an answer to the next request
KEPT = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Ask:
    """One benchmark: lengths, and either streams of a closed loop or requests a second."""

    input_tokens: int
    output_tokens: int
    concurrency: int | None = None
    request_rate: float | None = None
    prefix_hit_fraction: float = 0.0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    requests_per_stream: int = REQUESTS_PER_STREAM  # of a closed loop

    def check(self) -> None:
        """Refuses what no server could be asked."""
        for name in ("input_tokens", "output_tokens", "concurrency", "request_rate", "slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if (self.concurrency is None) == (self.request_rate is None):
            raise UserError("give either --concurrency or --request-rate")
        if not 0 <= self.prefix_hit_fraction <= 1:
            raise UserError(f"--prefix-hit-fraction must lie between 0 and 1, got {self.prefix_hit_fraction:g}")

    def sessions(self, spread: float, longest: int) -> Iterator[Session]:
        """The load: lengths vary by `spread` around the mean, at most to `longest` tokens in all."""
        rng, at_s = Random(0), 0.0
        shared = int(self.input_tokens * self.prefix_hit_fraction)

        def turn() -> Turn:
            new, out = (round(mean * rng.uniform(1 - spread, 1 + spread)) for mean in lengths)
            new = min(max(1, new - shared), max(1, longest - shared - 1))
            return Turn(new, min(max(1, out), longest - shared - new), TURNAROUND_S, compact_to=0)

        lengths = (self.input_tokens, self.output_tokens)
        for key in range(self.concurrency or OPEN_LOOP_REQUESTS):
            turns = [turn() for _ in range(self.requests_per_stream if self.concurrency else 1)]
            at_s += rng.expovariate(self.request_rate) if self.request_rate else 0.0
            yield Session(key, at_s, turns, shared_prefix_tokens=shared)


def predict(
    model: ModelSpec, gpu: GpuSpec, config: EngineConfig, ask: Ask, basis: Fitted | None = None
) -> dict[str, Any]:
    """Every answer of `kit predict --json`; `basis` of a calibration, with its intervals."""
    ask.check()
    resolved = resolve(config, model, gpu)
    basis = basis or fitted(model, gpu, resolved)
    limits, _, _ = replica(model, gpu, config, basis)
    steps = step_time(model, gpu, resolved, basis)
    longest = min(limits.max_model_len, limits.kv_blocks * limits.block_size)
    if ask.input_tokens + ask.output_tokens > longest:
        limit = "max_model_len" if longest == limits.max_model_len else "KV cache"
        raise UserError(f"--input-tokens + --output-tokens exceed the {limit} of {longest} tokens")
    # API and tokeniser act inside the loop, as a calibration saw them; published runs were fitted with them around it.
    inside = basis.basis == "calibrated"
    cluster = SimulationConfig(limits, warm=True, request_s=... if inside else None)
    simulation = Simulation(cluster, steps).run(ask.sessions(basis.length_spread, longest))
    before_s = 0.0 if inside else steps.request_s(ask.input_tokens, ask.concurrency or 1)
    limit_s = ask.slo_ttft_s and max(1e-9, ask.slo_ttft_s - before_s)
    found = answers(simulation, limit_s, ask.slo_tpot_s, set())
    delays = {"ttft_s": before_s, "tpot_s": 0.0, "e2el_s": before_s}
    result: dict[str, Any] = {
        name: {part: None if found[name][part] is None else found[name][part] + delay for part in KEPT}
        for name, delay in delays.items()
    }
    came = ask.request_rate * ask.output_tokens if ask.request_rate else inf
    stretch = 1 + before_s / found["e2el_s"]["mean"] if ask.concurrency else 1.0
    result |= {name: found[name] / stretch for name in ("output_tokens_per_s", "requests_per_s")}
    result |= {"itl_s": found["itl_s"], "intervals": basis.intervals(result, came), "basis": basis.basis}
    result |= {"slo_attainment_fraction": found["slo_attainment_fraction"], "warnings": list(basis.warnings)}
    result["limited_by"] = _limited_by(found["limited_by"], ask, steps, result)
    if result["limited_by"] == "kv_cache" and resolved.kv_cache_dtype == "auto":
        result["warnings"].append("requests queue for KV cache: --kv-cache-dtype fp8 would hold twice as many")
    return result


def _limited_by(stage: str, ask: Ask, steps: StepTime, result: dict[str, Any]) -> str:
    """What holds the most: the queue for KV cache, prefill, or a part of the decode step."""
    tpot_s = result["tpot_s"]["mean"]
    if stage != "decode" or not tpot_s:
        return stage
    rows = max(1, round(min(ask.concurrency or 1e9, result["output_tokens_per_s"] * tpot_s)))
    context = rows * (ask.input_tokens + ask.output_tokens // 2)
    if tpot_s > 2 * steps.step_s((), rows, context):
        return "prefill"  # others' prompts take more than half of the time between tokens
    return steps.limited_by(rows, context)
