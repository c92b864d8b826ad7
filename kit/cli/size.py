"""kit size: the engine's start-up memory, line by line, and the sessions that it holds."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kit import catalog
from kit.cli.options import Gpu, Json, Model, engine_options
from kit.engine_config import EngineConfig, engine_data, version_tuple
from kit.memory import MemoryPlan, plan, startlog
from kit.memory.sessions import Answer, Demand, alternatives, answer, engine_args
from kit.units import format_bytes, gib

if TYPE_CHECKING:
    from rich.table import Table


@engine_options
def command(
    config: EngineConfig,
    model: Model,
    gpu: Gpu,
    context_tokens: Annotated[int | None, Option(help="tokens a session has reached; default: max_model_len")] = None,
    sessions: Annotated[int, Option(help="active sessions to hold")] = 1,
    paused_sessions: Annotated[int, Option(help="sessions whose cache waits for a tool")] = 0,
    headroom_fraction: Annotated[float, Option(help="of the KV pool, left free")] = 0.0,
    log: Annotated[Path | None, Option(help="start-up log to compare with")] = None,
    as_json: Json = False,
) -> None:
    """What an engine's start-up log will say on that GPU, and how many sessions that holds."""
    spec, card = catalog.model(model), catalog.gpu(gpu)
    asked_length = config.max_model_len is not None
    values: dict[str, str] = {}
    if log:
        engine, values = startlog.read_log(log)
        config = startlog.config_from_log(config, engine, values)
    memory = plan(spec, card, config)
    context = memory.config.max_model_len if context_tokens is None else context_tokens
    demand = Demand(context, sessions, paused_sessions, headroom_fraction)
    result = answer(memory, demand, asked_max_model_len=asked_length)
    lines = list(startlog.compare(memory, values, config)) if log else []
    warnings = [*_warnings(memory, demand, result, config), *startlog.other_model(values, spec)]
    record = _record(memory, result, config, warnings, lines)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        _show(memory, demand, record, lines)


def _warnings(memory: MemoryPlan, demand: Demand, result: Answer, config: EngineConfig) -> Iterator[str]:
    """What the user should know before trusting or running this."""
    resolved, data = memory.config, engine_data(memory.config.engine)
    if version_tuple(resolved.engine_version) > version_tuple(str(data["last"])):
        yield f"{data['name']} {resolved.engine_version} is newer than any known here"
    if result.limited_by == "max_model_len":
        yield f"--context-tokens {demand.context_tokens} exceeds the engine's max_model_len {resolved.max_model_len}"
    elif 0 < result.max_model_len < resolved.max_model_len:
        yield (
            f"the pool holds no request of max_model_len {resolved.max_model_len}: the engine "
            f"would not start; --max-model-len {result.max_model_len} does"
        )
    if not result.fits:
        found = "; ".join(alternatives(memory.model, memory.gpu, config, demand))
        yield f"does not fit; would fit: {found or 'nothing tried here (8 GPUs, fp8, int4) does'}"
    if resolved.engine not in ("vllm", "sglang"):
        yield f"no start-up logs check the {data['name']} rule: a guess with a wide interval"
    if any(group.kind == "compressed" for group in memory.model.attention):
        yield "compressed KV cache: tokens are an average, engines page it differently"


def _record(
    memory: MemoryPlan, result: Answer, config: EngineConfig, told: list[str], lines: list[startlog.Compared]
) -> dict[str, Any]:
    """The JSON object; all bytes are whole numbers."""
    low, high = memory.kv_cache_bytes_interval
    own = ("engine", "engine_version", "quantization", "gpu_count", "max_num_seqs", "max_num_batched_tokens")
    terms = ("budget", "weights", "activation", "non_torch", "cuda_graph")
    return {
        "model": memory.model.key,
        "gpu": memory.gpu.key,
        **{name: getattr(memory.config, name) for name in own},
        "gpu_memory_bytes": memory.gpu.memory_bytes,
        **{f"{name}_bytes_per_gpu": round(getattr(memory, name).size_bytes) for name in terms},
        "cuda_graph_charged_to_pool": memory.graphs_charged,
        "kv_cache_bytes_per_gpu": round(memory.kv_cache_bytes),
        "kv_cache_bytes_interval": [round(low), round(high)],
        "kv_bytes_per_token": round(memory.kv_bytes_per_token),
        "kv_cache_tokens": memory.kv_cache_tokens(),
        "kv_cache_tokens_interval": [memory.kv_cache_tokens(low), memory.kv_cache_tokens(high)],
        **{name: round(size) if name.endswith("_bytes") else size for name, size in asdict(result).items()},
        "engine_args": engine_args(memory, result, config),
        "warnings": told,
        **({"log": [asdict(one) for one in lines]} if lines else {}),
    }


def _show(memory: MemoryPlan, demand: Demand, found: dict[str, Any], lines: list[startlog.Compared]) -> None:
    """Print the answer first, then where the memory goes, then the comparison with a log."""
    from rich.console import Console

    console, config = Console(highlight=False, soft_wrap=True), memory.config
    where = f"{config.gpu_count}x {memory.gpu.key}" if config.gpu_count > 1 else memory.gpu.key
    console.print(
        f"[bold]{memory.model.key}[/] {config.quantization} on {where}, {config.engine} {config.engine_version}"
    )
    console.print(
        f"{demand.sessions} active + {demand.paused_sessions} paused sessions of {demand.context_tokens:,} tokens: "
        f"[bold]{'fits' if found['fits'] else 'does not fit'}[/]; "
        f"up to {found['max_concurrent_sessions']:,} active, limited by {found['limited_by']}"
    )
    console.print(_memory_table(memory))
    low, high = found["kv_cache_tokens_interval"]
    console.print(
        f"KV cache: {found['kv_cache_tokens']:,} tokens (90 % {low:,} to {high:,}), "
        f"{format_bytes(found['kv_bytes_per_token'])} a token over all GPUs"
    )
    console.print("flags: " + " ".join(f"{flag} {value}".strip() for flag, value in found["engine_args"].items()))
    for warning in found["warnings"]:
        console.print(f"[yellow]![/] {warning}")
    if lines:
        console.print(_log_table(lines))


def _memory_table(memory: MemoryPlan) -> "Table":
    from rich.table import Table

    table = Table("per GPU, modelled", "GiB", "± 90 %", box=None, pad_edge=False)
    rows = [
        ("utilisation x memory", memory.budget),
        ("- weights", memory.weights),
        ("- activation peak", memory.activation),
        ("- non-torch", memory.non_torch),
        ("- CUDA graphs" if memory.graphs_charged else "(CUDA graphs, outside)", memory.cuda_graph),
        ("= KV pool", memory.pool),
    ]
    for name, term in rows:
        table.add_row(name, f"{gib(term.size_bytes):.2f}", f"{gib(term.half_width_bytes):.2f}")
    return table


def _log_table(lines: list[startlog.Compared]) -> "Table":
    from rich.table import Table

    table = Table("log line", "measured", "modelled", "± 90 %", "difference", box=None, pad_edge=False)
    for one in lines:
        form = ",.0f" if one.line.endswith("tokens") else ".2f"
        table.add_row(
            one.line, *(f"{value:{form}}" for value in (one.measured, one.predicted, one.half_width)), one.reason
        )
    return table
