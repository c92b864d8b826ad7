"""The decision: what a scenario's GPUs hold as asked, and the fewest of one kind that hold everything."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
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
    changes = [] if asked.answer.fits else list(alternatives(spec, gpu, config, demand, limit=8))
    return {
        "gpu": gpu.key,
        "model": spec.key,
        "asked": _chosen(asked, config),
        "recommended": _chosen(fewest, config) if fewest else None,
        "replicas": None if fewest else replicas(spec, gpu, config, demand),
        "paused_evicted": _chosen(hold(spec, gpu, config, replace(demand, paused_sessions=0)), config),
        "would_fit": changes,
        "fitting_gpus": [key for key in case.gpus if row(case, spec, find_gpu(key), config, demand)["fits"]],
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
    same = ("gpu_count", "tensor_parallel_size", "pipeline_parallel_size", "max_model_len")
    return {name: getattr(held.memory.config, name) for name in same} | {
        "fits": held.answer.fits,
        "sessions": held.answer.max_concurrent_sessions,
        "sessions_interval": list(held.sessions_interval),
        "limited_by": held.answer.limited_by,
        "kv_cache_tokens": held.memory.kv_cache_tokens(),
        "engine_args": engine_args(held.memory, held.answer, given),
    }


def _shares(case: Scenario, gpu: GpuSpec, config: EngineConfig) -> list[dict[str, Any]]:
    """The engines of a scenario that runs several, with the GPU and the share of each."""
    return [
        {"gpu": number, "fits": packing.fits, "model": share.model.key, "sessions": share.sessions}
        | {"gpu_memory_utilization": share.gpu_memory_utilization}
        for number, packing in enumerate(pack_roles(case, gpu, config))
        for share in packing.shares
    ]


def sentences(case: Scenario, demand: Demand, decision: Mapping[str, Any]) -> list[str]:
    """The decision in a few lines of plain text."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    texts = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = texts.get_template("decision.txt.j2").render(decision, case=case, demand=demand, most=COUNTS[-1])
    return text.splitlines()
