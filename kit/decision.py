"""The decision: what a scenario's GPUs hold as asked, and the fewest of one kind that hold everything."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog import gpu as find_gpu
from kit.engine_config import EngineConfig
from kit.memory.sessions import Demand, alternatives, engine_args
from kit.scenario import COUNTS, Held, Scenario, hold, pack_roles, row, smallest_count


def decide(case: Scenario, spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """The decision on one kind of GPU, as plain values for results.json."""
    asked = hold(spec, gpu, config, demand)
    fewest = smallest_count(spec, gpu, config, demand)
    rows = [row(case, spec, find_gpu(key), config, demand) for key in case.gpus]
    changes = [] if asked.answer.fits else list(alternatives(spec, gpu, config, demand, limit=8))
    return {
        "gpu": gpu.key,
        "model": spec.key,
        "asked": _chosen(asked, config),
        "recommended": _chosen(fewest, config) if fewest else None,
        "replicas": None if fewest else replicas(spec, gpu, config, demand),
        "paused_evicted": _chosen(hold(spec, gpu, config, replace(demand, paused_sessions=0)), config),
        "would_fit": changes,
        "fitting_gpus": [one["gpu"] for one in rows if one["fits"]],
        "separate_engines": _shares(case, gpu, config),
    }


def replicas(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, int] | None:
    """How many replicas of one full node hold the demand together, None where one holds no session."""
    node = hold(spec, gpu, replace(config, gpu_count=COUNTS[-1]), demand)
    if node.answer.limited_by == "max_model_len":
        return None
    usable = node.memory.kv_cache_bytes * (1 - demand.headroom_fraction)
    each = min(int(node.memory.concurrency(demand.context_tokens, usable)), node.memory.config.max_num_seqs)
    wanted = demand.sessions + demand.paused_sessions
    return {"gpu_count": COUNTS[-1], "sessions_each": each, "replicas": -(-wanted // each)} if each else None


def _chosen(held: Held, given: EngineConfig) -> dict[str, Any]:
    config = held.memory.config
    return {
        "gpu_count": config.gpu_count,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "fits": held.answer.fits,
        "sessions": held.answer.max_concurrent_sessions,
        "sessions_interval": list(held.sessions_interval),
        "limited_by": held.answer.limited_by,
        "max_model_len": config.max_model_len,
        "kv_cache_tokens": held.memory.kv_cache_tokens(),
        "engine_args": engine_args(held.memory, held.answer, given),
    }


def _shares(case: Scenario, gpu: GpuSpec, config: EngineConfig) -> list[dict[str, Any]]:
    """The engines of a scenario that runs several, with the GPU and the share of each."""
    return [
        {
            "gpu": number,
            "fits": packing.fits,
            "model": share.model.key,
            "gpu_memory_utilization": share.gpu_memory_utilization,
            "sessions": share.sessions,
        }
        for number, packing in enumerate(pack_roles(case, gpu, config) if case.models else [])
        for share in packing.shares
    ]


def sentences(case: Scenario, demand: Demand, decision: Mapping[str, Any]) -> list[str]:
    """The decision in a few lines of plain text."""
    asked, gpu, shares = decision["asked"], decision["gpu"], decision["separate_engines"]
    paused = f" and {demand.paused_sessions} paused" if demand.paused_sessions else ""
    lines = [f"{case.title}: {demand.sessions} active{paused} sessions of {demand.context_tokens:,} tokens."]
    if shares:
        fits = "fit" if all(share["fits"] for share in shares) else "do not fit"
        lines.append(f"{len(shares)} engines on {case.gpu_count}x {gpu} {fits}; model and --gpu-memory-utilization:")
        lines += [f"  {share['model']} {share['gpu_memory_utilization']:.3f}" for share in shares]
        lines.append(f"One engine of {decision['model']} in place of all of them:")
    lines.append(f"Asked, {_told(asked, gpu)}: {'fits' if asked['fits'] else 'does not fit'}.")
    if paused and not asked["fits"]:
        lines.append(f"With the paused evicted, {_told(decision['paused_evicted'], gpu)}.")
    lines += _recommended(decision, demand)
    if not asked["fits"]:
        lines.append("Would fit:" if decision["would_fit"] else "No other card or dtype tried here fits on 8 GPUs.")
        lines += [f"  {change}" for change in decision["would_fit"][:5]]
    fitting = ", ".join(decision["fitting_gpus"]) or "none"
    return [*lines, f"Of the scenario's GPUs these fit as asked: {fitting}."]


def _recommended(decision: Mapping[str, Any], demand: Demand) -> list[str]:
    best, node, gpu = decision["recommended"], decision["replicas"], decision["gpu"]
    wanted = demand.sessions + demand.paused_sessions
    if best:
        flags = " ".join(f"{flag} {value}".strip() for flag, value in best["engine_args"].items())
        longest = best["kv_cache_tokens"] // wanted
        grow = f"Room to grow: its pool holds {wanted} sessions of up to {longest:,} tokens each."
        return [f"Recommended, {_told(best, gpu)}.", f"Flags: {flags}", grow]
    if decision["asked"]["limited_by"] == "max_model_len":
        longest = decision["asked"]["max_model_len"]
        return [f"No GPU helps: {decision['model']} reads at most {longest:,} tokens."]
    if node:
        return [
            f"Recommended: {node['replicas']} replicas of {node['gpu_count']}x {gpu}, {node['sessions_each']} each."
        ]
    return [f"{COUNTS[-1]}x {gpu} do not hold one such session."]


def _told(chosen: Mapping[str, Any], gpu: str) -> str:
    low, high = chosen["sessions_interval"]
    count = chosen["sessions"]
    sessions = f"{count} session{'' if count == 1 else 's'} (90 % {low} to {high}), limited by {chosen['limited_by']}"
    return f"{chosen['gpu_count']}x {gpu}: {sessions}"
