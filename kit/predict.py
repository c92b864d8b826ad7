"""Latency and throughput of one replica under a benchmark's load, with 90 % intervals."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from random import Random
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.memory import plan
from kit.scheduler import scheduler_config
from kit.simulator import Simulation, SimulationConfig
from kit.simulator.answers import answers
from kit.steptime import Fitted, StepTime, fitted, work
from kit.workload import Session, Turn

REQUESTS_PER_STREAM = 10
OPEN_LOOP_REQUESTS = 400
TURNAROUND_S = 0.003  # client: from the last token of an answer to the next request
LATENCIES = ("ttft_s", "tpot_s", "e2el_s")
KEPT = ("mean", "p50", "p90", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One benchmark: lengths, and either streams of a closed loop or requests a second."""

    input_tokens: int
    output_tokens: int
    concurrency: int | None = None
    request_rate: float | None = None
    prefix_hit_fraction: float = 0.0

    def check(self, max_model_len: int) -> None:
        """Refuses what no server could be asked."""
        for name in ("input_tokens", "output_tokens", "concurrency", "request_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if (self.concurrency is None) == (self.request_rate is None):
            raise UserError("give either --concurrency or --request-rate")
        if not 0 <= self.prefix_hit_fraction <= 1:
            raise UserError(f"--prefix-hit-fraction must lie between 0 and 1, got {self.prefix_hit_fraction:g}")
        total = self.input_tokens + self.output_tokens
        if total > max_model_len:
            raise UserError(f"--input-tokens + --output-tokens = {total} exceed the max_model_len of {max_model_len}")

    def sessions(self, spread: float, longest: int) -> Iterator[Session]:
        """The load: lengths vary by `spread` around the mean, at most to `longest` tokens in all."""
        rng = Random(0)
        shared = int(self.input_tokens * self.prefix_hit_fraction)

        def turn(pause_s: float) -> Turn:
            new = max(1, round(self.input_tokens * rng.uniform(1 - spread, 1 + spread)) - shared)
            out = max(1, round(self.output_tokens * rng.uniform(1 - spread, 1 + spread)))
            new = min(new, max(1, longest - shared - 1))
            return Turn(new, min(out, longest - shared - new), pause_s, compact_to=0)

        at_s = 0.0
        for key in range(self.concurrency or OPEN_LOOP_REQUESTS):
            count = REQUESTS_PER_STREAM if self.concurrency else 1
            at_s += rng.expovariate(self.request_rate) if self.request_rate else 0.0
            yield Session(key, at_s, [turn(TURNAROUND_S) for _ in range(count)], shared_prefix_tokens=shared)


def predict(model: ModelSpec, gpu: GpuSpec, config: EngineConfig, ask: Ask) -> dict[str, Any]:
    """Every answer of `kit predict --json`."""
    resolved = resolve(config, model, gpu)
    ask.check(resolved.max_model_len)
    basis = fitted(model, gpu, resolved)
    steps = StepTime(work(model, gpu, resolved), basis.coefficients)
    limits = scheduler_config(resolved, plan(model, gpu, resolved).kv_cache_tokens())
    longest = min(resolved.max_model_len, limits.kv_blocks * limits.block_size)
    if ask.input_tokens + ask.output_tokens > longest:
        raise UserError(f"the KV cache holds {longest} tokens: one request of that length does not fit (see kit size)")
    simulation = Simulation(SimulationConfig(limits, warm=True), steps)
    simulation.run(ask.sessions(basis.length_spread, longest))
    found = answers(simulation, None, None, set())
    result: dict[str, Any] = {name: {part: found[name][part] for part in KEPT} for name in LATENCIES}
    before_s = steps.request_s(ask.input_tokens, ask.concurrency or 1)
    _delay(result, before_s)
    result["itl_s"] = found["itl_s"]
    result |= _throughput(found, ask, result, before_s)
    return result | {
        "intervals": _intervals(result, ask, basis),
        "limited_by": _limited_by(found, ask, steps, result),
        "basis": basis.basis,
        "warnings": list(basis.warnings),
    }


def _delay(result: dict[str, Any], before_s: float) -> None:
    """API and tokeniser come before the scheduler sees a request."""
    for name in ("ttft_s", "e2el_s"):
        for part, value in result[name].items():
            result[name][part] = None if value is None else value + before_s


def _throughput(found: dict[str, Any], ask: Ask, result: dict[str, Any], before_s: float) -> dict[str, float]:
    """Rates of the run; each request of a stream also spends the time before the scheduler."""
    stretch = 1.0
    if ask.concurrency:
        stretch = 1 + before_s / (result["e2el_s"]["mean"] - before_s)
    return {name: found[name] / stretch for name in ("output_tokens_per_s", "requests_per_s")}


def _intervals(result: dict[str, Any], ask: Ask, basis: Fitted) -> dict[str, list[float]]:
    """90 % intervals from the errors of cases with as much data behind them."""
    ttft, tpot = basis.ttft_factor, basis.tpot_factor
    total = result["e2el_s"]["mean"]
    share = min(1.0, result["ttft_s"]["mean"] / total)
    rate = ttft**share * tpot ** (1 - share)
    made = {
        "ttft_s_mean": _around(result["ttft_s"]["mean"], ttft),
        "ttft_s_p50": _around(result["ttft_s"]["p50"], ttft),
        "tpot_s_mean": _around(result["tpot_s"]["mean"], tpot),
        "output_tokens_per_s": _around(result["output_tokens_per_s"], rate),
    }
    if ask.request_rate:  # no more leaves than came
        low, high = made["output_tokens_per_s"]
        offered = ask.request_rate * ask.output_tokens
        made["output_tokens_per_s"] = [low, max(result["output_tokens_per_s"], min(high, offered))]
    return {name: edges for name, edges in made.items() if edges}


def _around(value: float | None, factor: float) -> list[float]:
    return [] if value is None else [value / factor, value * factor]


def _limited_by(found: dict[str, Any], ask: Ask, steps: StepTime, result: dict[str, Any]) -> str:
    """What holds the most: the queue, prefill, or a part of the decode step."""
    if found["limited_by"] != "decode":
        return str(found["limited_by"])
    tokens_per_s = result["output_tokens_per_s"]
    rows = max(1, round(min(ask.concurrency or tokens_per_s, tokens_per_s * (result["tpot_s"]["mean"] or 0.0))))
    context = rows * (ask.input_tokens + ask.output_tokens // 2)
    step_s = steps.step_s((), rows, context)
    if result["tpot_s"]["mean"] and log(result["tpot_s"]["mean"] / step_s) > log(2):
        return "prefill"  # others' prompts take more than half of the time between tokens
    return steps.limited_by(rows, context)
