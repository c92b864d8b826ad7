"""kit size: the engine's start-up memory, line by line, and the sessions that it holds."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli import options as o

if TYPE_CHECKING:
    from kit.engine_config import EngineConfig
    from kit.memory import MemoryPlan
    from kit.memory.sessions import Answer, Demand
    from kit.memory.startlog import Compared


def command(
    model: o.Model,
    gpu: o.Gpu,
    engine: o.Engine = "vllm",
    engine_version: o.EngineVersion = None,
    gpu_count: o.GpuCount = 1,
    tensor_parallel_size: o.TensorParallelSize = None,
    pipeline_parallel_size: o.PipelineParallelSize = 1,
    quantization: o.Quantization = None,
    kv_cache_dtype: o.KvCacheDtype = "auto",
    gpu_memory_utilization: o.GpuMemoryUtilization = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    enforce_eager: o.EnforceEager = False,
    context_tokens: Annotated[
        int | None, typer.Option(help="tokens a session has reached; default: max_model_len")
    ] = None,
    sessions: Annotated[int, typer.Option(help="active sessions to hold")] = 1,
    paused_sessions: Annotated[int, typer.Option(help="sessions whose cache waits for a tool")] = 0,
    headroom_fraction: Annotated[float, typer.Option(help="of the KV pool, left free")] = 0.0,
    log: Annotated[Path | None, typer.Option(help="start-up log to compare with")] = None,
    as_json: o.Json = False,
) -> None:
    """What an engine's start-up log will say on that GPU, and how many sessions that holds."""
    from kit import catalog
    from kit.engine_config import EngineConfig
    from kit.memory import plan, startlog
    from kit.memory import sessions as s

    spec, card = catalog.model(model), catalog.gpu(gpu)
    config = EngineConfig(
        engine=engine,
        engine_version=engine_version,
        gpu_count=gpu_count,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enforce_eager=enforce_eager,
    )
    values: dict[str, str] = {}
    if log:
        logged_engine, values = startlog.read_log(log)
        config = startlog.config_from_log(config, logged_engine, values)
    memory = plan(spec, card, config)
    demand = s.Demand(
        context_tokens=memory.config.max_model_len if context_tokens is None else context_tokens,
        sessions=sessions,
        paused_sessions=paused_sessions,
        headroom_fraction=headroom_fraction,
    )
    result = s.answer(memory, demand, asked_max_model_len=max_model_len is not None)
    warnings = _warnings(memory, demand, result, config)
    if other := startlog.model_of(values, spec):
        warnings.append(other)
    lines = list(startlog.compare(memory, values, card, config)) if log else []
    record = _record(memory, result, config, warnings, lines)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        from kit.cli.size_table import show

        show(memory, demand, result, record, lines)


def _warnings(memory: "MemoryPlan", demand: "Demand", result: "Answer", config: "EngineConfig") -> list[str]:
    """What the user should know before trusting or running this."""
    from kit.engine_config import engine_data, version_tuple
    from kit.memory.sessions import alternatives

    resolved, warnings = memory.config, []
    data = engine_data(resolved.engine)
    if version_tuple(resolved.engine_version) > version_tuple(str(data["last"])):
        warnings.append(f"{data['name']} {resolved.engine_version} is newer than any known here")
    if result.limited_by == "max_model_len":
        warnings.append(
            f"--context-tokens {demand.context_tokens} exceeds the engine's max_model_len {resolved.max_model_len}"
        )
    elif 0 < result.max_model_len < resolved.max_model_len:
        warnings.append(
            f"the pool holds no request of max_model_len {resolved.max_model_len}: the engine "
            f"would not start; --max-model-len {result.max_model_len} does"
        )
    if not result.fits:
        found = list(alternatives(memory.model, memory.gpu, config, demand))
        would = "; ".join(found) if found else "nothing tried here (8 GPUs, fp8, int4) does"
        warnings.append(f"does not fit; would fit: {would}")
    if resolved.engine not in ("vllm", "sglang"):
        warnings.append(f"no start-up logs check the {data['name']} rule: a guess with a wide interval")
    if any(group.kind == "compressed" for group in memory.model.attention):
        warnings.append("compressed KV cache: tokens are an average, engines page it differently")
    return warnings


def _record(
    memory: "MemoryPlan", result: "Answer", config: "EngineConfig", warnings: list[str], lines: "list[Compared]"
) -> dict[str, Any]:
    """The JSON object, all bytes whole numbers."""
    from kit.memory.sessions import engine_args

    low, high = memory.kv_cache_bytes_interval
    record: dict[str, Any] = {
        "model": memory.model.key,
        "gpu": memory.gpu.key,
        "engine": memory.config.engine,
        "engine_version": memory.config.engine_version,
        "quantization": memory.config.quantization,
        "gpu_count": memory.config.gpu_count,
        "gpu_memory_bytes": memory.gpu.memory_bytes,
        "budget_bytes_per_gpu": round(memory.budget.size_bytes),
        "weights_bytes_per_gpu": round(memory.weights.size_bytes),
        "activation_bytes_per_gpu": round(memory.activation.size_bytes),
        "non_torch_bytes_per_gpu": round(memory.non_torch.size_bytes),
        "cuda_graph_bytes_per_gpu": round(memory.cuda_graph.size_bytes),
        "cuda_graph_charged_to_pool": memory.graphs_charged,
        "kv_cache_bytes_per_gpu": round(memory.kv_cache_bytes),
        "kv_cache_bytes_interval": [round(low), round(high)],
        "kv_bytes_per_token": round(memory.kv_bytes_per_token),
        "kv_cache_tokens": memory.kv_cache_tokens(),
        "kv_cache_tokens_interval": [memory.kv_cache_tokens(low), memory.kv_cache_tokens(high)],
        "max_concurrent_sessions": result.max_concurrent_sessions,
        "limited_by": result.limited_by,
        "required_bytes": round(result.required_bytes),
        "shortfall_bytes": round(result.shortfall_bytes),
        "fits": result.fits,
        "max_num_seqs": memory.config.max_num_seqs,
        "max_num_batched_tokens": memory.config.max_num_batched_tokens,
        "max_model_len": result.max_model_len,
        "engine_args": engine_args(memory, result, config),
        "warnings": warnings,
    }
    if lines:
        record["log"] = [
            {
                "line": one.line,
                "measured": one.measured,
                "predicted": round(one.predicted, 4),
                "half_width": round(one.half_width, 4),
                "reason": one.reason,
            }
            for one in lines
        ]
    return record
