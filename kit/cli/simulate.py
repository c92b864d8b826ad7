"""kit simulate: agent sessions or a recorded trace through the scheduler in virtual time."""

from math import inf
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli import options
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError, flag

if TYPE_CHECKING:
    from kit.traces import Trace
    from kit.workload import Workload

SHOWN = {
    **dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "e2el_s", "task_s"), "mean p50 p90 p99"),
    **dict.fromkeys(("completed", "refused", "unfinished", "preemptions", "output_tokens_per_s"), ""),
    **dict.fromkeys(("prefix_hit_fraction", "slo_attainment_fraction"), ""), "kv_cache_usage": "mean max",
    "burst": "requests time_to_recover_s backlog_request_s largest_passing_burst", "limited_by": "",
}  # fmt: skip


@options.engine_options
def command(
    config: EngineConfig,
    model: options.Model,
    gpu: options.Gpu,
    workload: Annotated[str | None, typer.Option(help="key of data/workloads, a YAML file or a recording")] = None,
    trace: Annotated[str | None, typer.Option(help="file of recorded calls")] = None,
    trace_format: Annotated[str | None, typer.Option(help="azure, mooncake, weka, burstgpt, recorded")] = None,
    sessions: Annotated[int | None, typer.Option(help="sessions that arrive")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds; the clock stops there")] = None,
    burst: Annotated[int | None, typer.Option(help="sessions that come at once")] = None,
    replicas: int = 1,
    routing: Annotated[str, typer.Option(help="round-robin, least-loaded, session or prefix")] = "session",
    seed: int = 0,
    drop_kv: Annotated[bool, typer.Option("--drop-kv", help="pauses lose a session's KV")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="shared prefixes are cached already")] = False,
    ready_after: Annotated[float, typer.Option(help="seconds until cold replicas serve")] = 0.0,
    calibration: options.Calibration = None,
    slo_ttft_s: options.SloTtft = None,
    slo_tpot_s: options.SloTpot = None,
    json_output: options.Json = False,
) -> None:
    """Plays agent sessions or a recorded trace through simulated replicas."""
    from kit import catalog, simulator
    from kit.steptime import fitted

    _check(sessions=(sessions, 0), duration=(duration, 0), burst=(burst, 0), replicas=(replicas, 0), seed=(seed, -1),
           ready_after=(ready_after, -1))  # fmt: skip
    source = _source(workload, trace, trace_format)
    load = simulator.Load(source, sessions, duration, burst, seed)
    spec, card, basis = catalog.model(model), catalog.gpu(gpu), None
    if calibration is not None:
        from kit import calibrate

        config, basis = calibrate.load(calibration).apply(spec, card, config)
    basis = basis or fitted(spec, card, resolve(config, spec, card))
    limits, step_time, warnings = simulator.replica(spec, card, config, basis)
    cluster = simulator.SimulationConfig(limits, replicas, routing, not drop_kv, warm, ready_after, duration)
    preset = getattr(source, "slo", None)
    ttft_s, tpot_s = slo_ttft_s or getattr(preset, "ttft_s", None), slo_tpot_s or getattr(preset, "tpot_s", None)
    result = simulator.study(cluster, step_time, load, ttft_s, tpot_s, basis)
    result["slo"] = {"ttft_s": ttft_s, "tpot_s": tpot_s}
    result["warnings"] = warnings + result.pop("warnings")
    options.tell(result, _text, json_output)


def _check(**given: tuple[float | None, float]) -> None:
    """Refuses what is not finite or not above the lower bound beside it."""
    for name, (value, above) in given.items():
        if value is not None and not above < value < inf:
            raise UserError(f"{flag(name)} must be above {above:g}, got {value:g}")


def _source(workload: str | None, trace: str | None, trace_format: str | None) -> "Workload | Trace":
    from kit.traces import READERS, read
    from kit.workload import load, names

    if workload is not None and trace is None:
        return load(workload)
    if trace is None or workload is not None:
        raise UserError(f"give --workload or --trace; workloads: {', '.join(names())}")
    if trace_format is None:
        raise UserError(f"--trace needs --trace-format: {', '.join(READERS)}")
    return read(trace, trace_format)


def _text(result: dict[str, Any]) -> str:
    """The main answers, one a line."""
    lines = []
    for name, parts in SHOWN.items():
        value = result[name]
        if parts:
            value = ", ".join(f"{part} {options.number(value[part])}" for part in parts.split() if part in value)
        lines.append(f"{name:<26}{options.number(value)}")
    for kind in ("active", "queued", "paused"):
        count = result["sessions"][kind]
        lines.append(f"{kind + ' sessions':<26}mean {options.number(count['mean'])}, max {count['max']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])]) + "\n"
