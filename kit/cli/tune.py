"""kit tune: from an SLO to confirmed engine limits in few starts."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kit.cli import options as o
from kit.engine_config import EngineConfig
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.tune.levels import Boot, Level, Result

HEADINGS = ("start", "seqs", "load", "turns", "in time", "good/s", "TTFT p95 s", "TPOT p95 s", "KV")
WORKLOAD = Option(help="key of data/workloads, or a YAML file")
COMMAND = Option(help="starts the engine; with {flags}, may have {port} {model}")
SESSIONS = Option(min=1, help="expected within the duration; default: what the model predicts to fit")
OUT = Option(help="keeps what was measured; the same folder goes on where it was")


@o.engine_options
def command(
    config: EngineConfig,
    model: o.Model,
    gpu: o.Gpu,
    workload: Annotated[str, WORKLOAD],
    engine_command: Annotated[str | None, COMMAND] = None,
    base_url: Annotated[str | None, Option(help="a server that you restart when asked")] = None,
    emulate: Annotated[bool, Option("--emulate", help="kit emulate, in real time")] = False,
    simulate: Annotated[bool, Option("--simulate", help="the engine in virtual time")] = False,
    truth: Annotated[int | None, Option(min=0, metavar="SEED", help="a hidden machine behind one of these")] = None,
    slo_ttft_s: o.SloTtft = None,
    slo_tpot_s: o.SloTpot = None,
    max_boots: Annotated[int, Option(min=1, help="engine starts at most")] = 3,
    sessions: Annotated[int | None, SESSIONS] = None,
    duration: Annotated[float | None, Option(min=1, help="seconds of an open-loop level")] = None,
    burst: Annotated[int | None, Option(min=1, help="sessions at once at half of the duration")] = None,
    api_key_env: o.ApiKeyEnv = None,
    start_deadline_s: Annotated[float, Option(min=1, help="until the engine must be healthy")] = 1800.0,
    out: Annotated[Path | None, OUT] = None,
    as_json: o.Json = False,
) -> None:
    """Find max_num_seqs and its companions for an SLO, and confirm them with engine starts."""
    from kit.tune.ask import How, Question, answer

    ways = {"engine_command": engine_command, "base_url": base_url, "emulate": emulate, "simulate": simulate}
    given = [name for name, value in ways.items() if value]
    if len(given) != 1:
        raise UserError("give one of: --engine-command, --base-url, --emulate, --simulate")
    if truth is not None and given[0] not in ("emulate", "simulate"):
        raise UserError("--truth SEED needs --emulate or --simulate")
    machine = (given[0], engine_command or base_url or "", truth)
    question = Question(model, gpu, config, workload, *machine, slo_ttft_s, slo_tpot_s, sessions, duration, burst)
    with TemporaryDirectory(prefix="kit-") as scratch, view() as progress:
        how = How(max_boots, api_key_env, start_deadline_s)
        result = answer(question, out or Path(scratch), how, progress)
    sys.stdout.write(json.dumps(asdict(result)) + "\n" if as_json else text(result))


@contextmanager
def view() -> "Iterator[Callable[[Boot | Level], None]]":
    """What is told of each start and level as it comes: a table that grows on a terminal, else a line each."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console, table = Console(stderr=True), Table(*HEADINGS, box=None, padding=(0, 1, 0, 0))

    def tell(one: "Boot | Level") -> None:
        cells = row(one)
        table.add_row(*cells)
        if console.is_terminal:
            live.refresh()
        else:
            sys.stderr.write("  ".join(f"{h} {c}" for h, c in zip(HEADINGS, cells, strict=True) if c) + "\n")

    live = Live(table, console=console, auto_refresh=False)
    with live if console.is_terminal else nullcontext():
        yield tell


def row(one: "Boot | Level") -> list[str]:
    """A start or a level in the words of HEADINGS."""
    from kit.tune.levels import Boot

    if isinstance(one, Boot):
        seconds = "" if one.start_s is None else f"{one.start_s:.0f} s"
        tokens = "" if one.kv_cache_tokens is None else f"{one.kv_cache_tokens:,} KV"
        return [str(one.index), str(one.max_num_seqs), f"{seconds} {tokens}".strip(), *[""] * 6]
    load = f"{one.kind} {one.concurrency or 'all'}"
    numbers = (one.goodput_requests_per_s, one.ttft_s["p95"], one.tpot_s["p95"])
    told = ["-" if number is None else f"{number:.3g}" for number in numbers]
    used = "-" if one.kv_cache_usage_max is None else f"{one.kv_cache_usage_max:.0%}"
    counted = [str(one.n), f"{one.slo_attainment_fraction:.0%}"]
    return [str(one.boot), str(one.max_num_seqs), load, *counted, *told, used]


def text(result: "Result") -> str:
    """The answer for people."""
    verdict = "confirmed" if result.confirmed else "not confirmed"
    lines = [f"{result.status}, {verdict} after {result.boots} engine starts; limited by {result.limited_by}"]
    lines += [f"  {flag} {value}" for flag, value in result.engine_args.items()]
    lines += [f"  {name}: {reason}" for name, reason in result.reasons.items()]
    if result.goodput_requests_per_s is not None:
        lines.append(f"{result.goodput_requests_per_s:.3g} turns/s in time, {result.slo_attainment_fraction:.0%}")
    return "\n".join([*lines, *result.notes]) + "\n"
