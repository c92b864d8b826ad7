"""kit size: the engine's start-up memory, line by line, and the sessions that it holds."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kit.cli.options import Gpu, Json, Model, engine_options
from kit.engine_config import EngineConfig


@engine_options
def command(
    config: EngineConfig,
    model: Model,
    gpu: Gpu,
    context_tokens: Annotated[
        int | None, typer.Option(help="tokens a session has reached; default: max_model_len")
    ] = None,
    sessions: Annotated[int, typer.Option(help="active sessions to hold")] = 1,
    paused_sessions: Annotated[int, typer.Option(help="sessions whose cache waits for a tool")] = 0,
    headroom_fraction: Annotated[float, typer.Option(help="of the KV pool, left free")] = 0.0,
    log: Annotated[Path | None, typer.Option(help="start-up log to compare with")] = None,
    as_json: Json = False,
) -> None:
    """What an engine's start-up log will say on that GPU, and how many sessions that holds."""
    from kit import catalog
    from kit.cli import size_report as report
    from kit.memory import plan, startlog
    from kit.memory.sessions import Demand, answer

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
    warnings = [*report.warnings(memory, demand, result, config), *startlog.other_model(values, spec)]
    record = report.record(memory, result, config, warnings, lines)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        report.show(memory, demand, record, lines)
