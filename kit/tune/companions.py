"""The flags that belong to a tuned max_num_seqs, each with its reason in a line, in the engine's own words."""

from collections.abc import Sequence
from math import ceil, isinf
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, engine_data, resolve, version_tuple
from kit.tune.levels import Goal, Level

KEPT = ("max_num_batched_tokens", "gpu_memory_utilization")  # as they were while max_num_seqs was measured


def companions(
    model: ModelSpec, gpu: GpuSpec, config: EngineConfig, goal: Goal, best: int, levels: Sequence[Level]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Recommended values by our names, engine arguments, and the reason for each value."""
    resolved, data = resolve(config, model, gpu), engine_data(config.engine)
    values: dict[str, Any] = {"max_num_seqs": best} | {name: getattr(resolved, name) for name in KEPT}
    reasons = dict.fromkeys(KEPT, "as it was in every measurement of max_num_seqs; another value needs another tuning")
    flags = {name: data["flags"][name] for name in values}
    for name, (value, reason) in _admission(goal, best, levels, data.get("admission", {})).items():
        rule = data["admission"][name]
        if version_tuple(resolved.engine_version) >= version_tuple(str(rule["from"])):
            values[name], reasons[name], flags[name] = value, reason, rule["flag"]
    for name in [name for name in values if not flags.get(name)]:
        reasons[name] = f"{data['name']} has no flag for it"
    arguments = {
        flags[name]: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if flags.get(name)
    }
    return values, arguments, reasons


def _admission(goal: Goal, best: int, levels: Sequence[Level], rules: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """What may queue and still get its first token in time, by what was measured."""
    found: dict[str, tuple[int, str]] = {}
    if isinf(goal.slo_ttft_s):
        return found
    slo_ttft_s, turns_per_s = goal.slo_ttft_s, max(one.requests_per_s for one in levels)
    if rule := rules.get("max_num_queued_reqs"):
        running = best if rule["counts"] == "in_flight" else 0
        text = f"{turns_per_s:.3g} turns/s measured x {slo_ttft_s:g} s TTFT limit" + f" + {running} running" * (
            running > 0
        )
        found["max_num_queued_reqs"] = (running + max(1, ceil(turns_per_s * slo_ttft_s)), text)
    if "max_num_queued_tokens" in rules:
        rates = [one.requests_per_s * one.input_tokens_mean for one in levels]
        rates += [one.input_tokens_mean / one.ttft_s["mean"] for one in levels if one.limit == 1 and one.ttft_s["mean"]]
        text = f"{max(rates):,.0f} prompt tokens/s measured, cached ones included, x {slo_ttft_s:g} s TTFT limit"
        found["max_num_queued_tokens"] = (max(1, round(max(rates) * slo_ttft_s)), text)
    return found
