"""kit simulate: agent sessions or a recorded trace through the scheduler in virtual time."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli import options
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.simulator import Load

LATENCIES = "mean p50 p90 p99"
SHOWN = {
    "ttft_s": LATENCIES, "tpot_s": LATENCIES, "itl_s": LATENCIES, "e2el_s": LATENCIES, "task_s": LATENCIES,
    "completed": "", "refused": "", "unfinished": "", "preemptions": "", "output_tokens_per_s": "",
    "prefix_hit_fraction": "", "slo_attainment_fraction": "", "kv_cache_usage": "mean max",
    "burst": "requests time_to_recover_s backlog_request_s largest_passing_burst", "limited_by": "",
}  # fmt: skip


def command(
    model: options.Model,
    gpu: options.Gpu,
    workload: Annotated[str | None, typer.Option(help="key of data/workloads, or a YAML file")] = None,
    trace: Annotated[str | None, typer.Option(help="file of recorded calls")] = None,
    trace_format: Annotated[str | None, typer.Option(help="azure, mooncake, weka, burstgpt")] = None,
    sessions: Annotated[int | None, typer.Option(help="sessions that arrive")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds; the clock stops there")] = None,
    burst: Annotated[int | None, typer.Option(help="sessions that come at once")] = None,
    replicas: int = 1,
    routing: Annotated[str, typer.Option(help="round-robin, least-loaded, session or prefix")] = "session",
    seed: int = 0,
    drop_kv: Annotated[bool, typer.Option("--drop-kv", help="pauses lose a session's KV")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="shared prefixes are cached already")] = False,
    ready_after: Annotated[float, typer.Option(help="seconds until cold replicas serve")] = 0.0,
    engine: options.Engine = "vllm",
    engine_version: options.EngineVersion = None,
    gpu_count: options.GpuCount = 1,
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = 1,
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KvCacheDtype = "auto",
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    enforce_eager: options.EnforceEager = False,
    slo_ttft_s: options.SloTtft = None,
    slo_tpot_s: options.SloTpot = None,
    json_output: options.Json = False,
) -> None:
    """Plays agent sessions or a recorded trace through simulated replicas."""
    given = dict(locals())
    from kit import catalog, simulator
    from kit.engine_config import EngineConfig

    names = EngineConfig.__dataclass_fields__
    config = EngineConfig(**{name: value for name, value in given.items() if name in names})
    _check(sessions=sessions, duration=duration, burst=burst, replicas=replicas,
           slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s)  # fmt: skip
    load = _load(workload, trace, trace_format)
    load = replace(load, sessions=sessions, duration_s=duration, burst=burst, seed=seed)
    limits, step_time, warnings = simulator.replica(catalog.model(model), catalog.gpu(gpu), config)
    cluster = simulator.SimulationConfig(limits, replicas, routing, not drop_kv, warm, ready_after, duration)
    slo = getattr(load.source, "slo", None)
    ttft_s = slo_ttft_s or (slo and slo.ttft_s)
    tpot_s = slo_tpot_s or (slo and slo.tpot_s)
    result = simulator.study(cluster, step_time, load, ttft_s, tpot_s)
    result["slo"] = {"ttft_s": ttft_s, "tpot_s": tpot_s}
    result["warnings"] = warnings + result.pop("warnings")
    if json_output:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        sys.stdout.write(_text(result))


def _check(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")


def _load(workload: str | None, trace: str | None, trace_format: str | None) -> "Load":
    from kit.simulator import Load
    from kit.traces import READERS, read
    from kit.workload import load, names

    if (workload is None) == (trace is None):
        raise UserError(f"give --workload or --trace; workloads: {', '.join(names())}")
    if workload is not None:
        return Load(load(workload))
    if trace is None or trace_format is None:
        raise UserError(f"--trace needs --trace-format: {', '.join(READERS)}")
    return Load(read(trace, trace_format))


def _text(result: dict[str, Any]) -> str:
    """The main answers, one a line."""
    lines = []
    for name in SHOWN:
        value = result[name]
        if isinstance(value, dict):
            value = ", ".join(f"{part} {_number(value[part])}" for part in SHOWN[name].split() if part in value)
        lines.append(f"{name:<26}{_number(value)}")
    for kind in ("active", "queued", "paused"):
        mean, most = result["sessions"][kind]["mean"], result["sessions"][kind]["max"]
        lines.append(f"{kind + ' sessions':<26}mean {_number(mean)}, max {most}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])]) + "\n"


def _number(value: object) -> str:
    return "unknown" if value is None else f"{value:,.4g}" if isinstance(value, int | float) else str(value)
