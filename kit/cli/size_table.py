"""The tables that `kit size` prints for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from kit.memory import MemoryPlan
from kit.memory.sessions import Answer, Demand
from kit.memory.startlog import Compared
from kit.units import format_bytes


def show(memory: MemoryPlan, demand: Demand, result: Answer, record: dict[str, Any], lines: list[Compared]) -> None:
    """Print the answer first, then where the memory goes, then the comparison with a log."""
    console = Console(highlight=False)
    config = memory.config
    where = f"{config.gpu_count}x {memory.gpu.key}" if config.gpu_count > 1 else memory.gpu.key
    console.print(
        f"[bold]{memory.model.key}[/] {config.quantization} on {where}, {config.engine} {config.engine_version}"
    )
    verdict = "fits" if result.fits else "does not fit"
    console.print(
        f"{demand.sessions} active + {demand.paused_sessions} paused sessions of "
        f"{demand.context_tokens:,} tokens: [bold]{verdict}[/]; "
        f"up to {result.max_concurrent_sessions:,} active, limited by {result.limited_by}"
    )
    console.print(_memory_table(memory))
    low, high = record["kv_cache_tokens_interval"]
    console.print(
        f"KV cache: {record['kv_cache_tokens']:,} tokens (90 % {low:,} to {high:,}), "
        f"{format_bytes(record['kv_bytes_per_token'])} a token over all GPUs"
    )
    flags = " ".join(f"{flag} {value}".strip() for flag, value in record["engine_args"].items())
    console.print(f"flags: {flags}")
    for warning in record["warnings"]:
        console.print(f"[yellow]![/] {warning}")
    if lines:
        console.print(_log_table(lines))


def _memory_table(memory: MemoryPlan) -> Table:
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
        table.add_row(name, f"{term.size_bytes / 2**30:.2f}", f"{term.half_width_bytes / 2**30:.2f}")
    return table


def _log_table(lines: list[Compared]) -> Table:
    table = Table("log line", "measured", "modelled", "± 90 %", "difference", box=None, pad_edge=False)
    for one in lines:
        form = ",.0f" if one.line.endswith("tokens") else ".2f"
        values = (format(value, form) for value in (one.measured, one.predicted, one.half_width))
        table.add_row(one.line, *values, one.reason)
    return table
