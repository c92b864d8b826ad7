"""The decision: what a scenario's GPUs hold as asked, and the fewest of one kind that hold everything."""

from collections.abc import Mapping, Sequence
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog import gpu as find_gpu
from kit.engine_config import EngineConfig
from kit.memory.sessions import Demand, alternatives, engine_args
from kit.scenario import COUNTS, Held, Scenario, hold, pack_roles, row, smallest_count


def decide(case: Scenario, spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """The decision on one kind of GPU: what was asked, and the fewest GPUs that hold it."""
    asked = hold(spec, gpu, config, demand)
    fewest = smallest_count(spec, gpu, config, demand)
    rows = [row(case, spec, find_gpu(key), config, demand) for key in case.gpus]
    changes = [] if asked.answer.fits else list(alternatives(spec, gpu, config, demand, limit=8))
    sizes = [change for change in changes if "--tensor-parallel-size" in change]
    changes = [change for change in changes if change not in sizes[1:]]  # the fewest GPUs say it
    return {
        "asked": _chosen(asked, config),
        "recommended": _chosen(fewest, config) if fewest else None,
        "would_fit": changes,
        "fitting_gpus": [one["gpu"] for one in rows if one["fits"]],
        "separate_engines": _shares(case, gpu, config),
    }


def _chosen(held: Held, given: EngineConfig) -> dict[str, Any]:
    config, low_high = held.memory.config, list(held.sessions_interval)
    return {
        "gpu_count": config.gpu_count,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "fits": held.answer.fits,
        "sessions": held.answer.max_concurrent_sessions,
        "sessions_interval": low_high,
        "limited_by": held.answer.limited_by,
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


def sentences(case: Scenario, gpu: GpuSpec, demand: Demand, decision: Mapping[str, Any]) -> list[str]:
    """The decision in a few lines of plain text."""
    asked, best = decision["asked"], decision["recommended"]
    wanted = demand.sessions + demand.paused_sessions
    lines = [f"{case.title}: {wanted} sessions of {demand.context_tokens:,} tokens."]
    lines.append(f"Asked, {_told(asked, gpu)}: {'fits' if asked['fits'] else 'does not fit'}.")
    if best:
        lines.append(f"Recommended, {_told(best, gpu)}.")
        lines.append("Flags: " + " ".join(f"{flag} {value}".strip() for flag, value in best["engine_args"].items()))
        longest = best["kv_cache_tokens"] // wanted
        lines.append(f"Room to grow: its pool holds {wanted} sessions of up to {longest:,} tokens each.")
    else:
        lines.append(f"Up to {COUNTS[-1]}x {gpu.key} do not hold them on one replica at these dtypes.")
    if not asked["fits"]:
        lines.append("Would fit:" if decision["would_fit"] else "Nothing tried here fits (8 GPUs, fp8, int4).")
        lines += [f"  {change}" for change in decision["would_fit"][:5]]
    lines.append(f"Of the scenario's GPUs these fit as asked: {_listed(decision['fitting_gpus'])}.")
    if shares := decision["separate_engines"]:
        fits = "fit" if all(share["fits"] for share in shares) else "do not fit"
        parts = ", ".join(f"{s['model']} {s['gpu_memory_utilization']:.3f}" for s in shares)
        lines.append(f"As separate engines on {case.gpu_count}x {gpu.key} they {fits}: {parts}.")
    return lines


def _told(chosen: Mapping[str, Any], gpu: GpuSpec) -> str:
    low, high = chosen["sessions_interval"]
    sessions = f"{chosen['sessions']} sessions (90 % {low} to {high}), limited by {chosen['limited_by']}"
    return f"{chosen['gpu_count']}x {gpu.key}: {sessions}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
