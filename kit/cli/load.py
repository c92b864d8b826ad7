"""`kit load`: measure a server under a burst, a closed loop, a rate or agent sessions."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli.options import Json, SloTpot, SloTtft
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.loadgen import Level


def command(
    base_url: Annotated[str, typer.Option(help="http://HOST:PORT, with or without /v1")],
    model: Annotated[str, typer.Option(help="the model name that the server knows")],
    input_tokens: Annotated[int | None, typer.Option(help="prompt tokens of each request")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="answer tokens of each request")] = None,
    workload: Annotated[str | None, typer.Option(help="key of data/workloads, or a file")] = None,
    trace: Annotated[Path | None, typer.Option(help="trace file to replay")] = None,
    trace_format: Annotated[
        str | None, typer.Option(help="azure, mooncake, weka, burstgpt")
    ] = None,
    burst: Annotated[str | None, typer.Option(help="N at once; 100,1000 for levels")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="N streams, each goes on when it ends; with a rate: a cap")
    ] = None,
    request_rate: Annotated[str | None, typer.Option(help="arrivals per second")] = None,
    burstiness: Annotated[float, typer.Option(help="CV of the gaps; 1 is Poisson")] = 1.0,
    requests: Annotated[int | None, typer.Option(help="how many requests or sessions")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds in which they start")] = None,
    slo_ttft_s: SloTtft = None,
    slo_tpot_s: SloTpot = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable with the API key")
    ] = None,
    metrics_url: Annotated[str | None, typer.Option(help="default: /metrics of the server")] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions")] = "chat",
    cold_connects: Annotated[
        bool, typer.Option("--cold-connects", help="a new connection for each request")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="a longer request is a failure")] = 600.0,
    workers: Annotated[int | None, typer.Option(help="processes; default by streams")] = None,
    seed: Annotated[int, typer.Option(help="of arrivals and sessions")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for requests.jsonl and results")] = None,
    as_json: Json = False,
) -> None:
    """Load-test a server and say whether this client's numbers can be believed."""
    asked = {name: value for name, value in locals().items() if name not in ("out", "as_json")}
    asked["trace"] = trace and str(trace)
    _check(asked)
    from kit.loadgen import Options, Target, measure
    from kit.loadgen.equivalents import equivalents

    target = Target(base_url, model, endpoint, api_key_env, timeout_s, cold_connects)
    levels = _levels(asked)
    options = Options(slo_ttft_s, slo_tpot_s, workers, metrics_url)
    summaries = measure(target, levels, options, out, asked)
    if input_tokens and output_tokens:
        for level, summary in zip(levels, summaries, strict=True):
            same = equivalents(target, level, input_tokens, output_tokens, burstiness)
            summary["equivalents"] = same
    _tell(summaries, as_json)


def _check(asked: dict[str, Any]) -> None:
    """Refuse bad and contradicting options, each named with its value."""
    for name in ("input_tokens", "output_tokens", "requests", "duration", "workers", "burstiness",
                 "timeout_s", "slo_ttft_s", "slo_tpot_s"):  # fmt: skip
        value = asked[name]
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: want a number above 0")
    if asked["endpoint"] not in ("chat", "completions"):
        raise UserError(f"--endpoint {asked['endpoint']!r}: choices: chat, completions")
    lengths = asked["input_tokens"] is not None or asked["output_tokens"] is not None
    given = [lengths, asked["workload"] is not None, asked["trace"] is not None]
    if sum(given) != 1:
        raise UserError("give one of: --input-tokens with --output-tokens, --workload, --trace")
    if lengths and None in (asked["input_tokens"], asked["output_tokens"]):
        raise UserError("--input-tokens and --output-tokens are needed together")
    if (asked["trace"] is None) != (asked["trace_format"] is None):
        raise UserError("--trace and --trace-format are needed together")
    rate, burst = asked["request_rate"], asked["burst"]
    if burst is not None and (rate is not None or asked["concurrency"] is not None):
        raise UserError("--burst excludes --concurrency and --request-rate")
    name = asked["api_key_env"]
    if name is not None and not os.environ.get(name, "").strip().isprintable():
        raise UserError(f"--api-key-env {name}: its value is not a key")
    if name is not None and not os.environ.get(name):
        raise UserError(f"--api-key-env {name}: no such environment variable, or it is empty")


def _values(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """The levels of an option: positive numbers separated by commas."""
    try:
        values = [kind(part) for part in text.split(",")]
        if min(values) <= 0 or max(values) == float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{option} {text!r}: want a number above 0, or several with commas"
        ) from None
    return [float(value) for value in values]


def _levels(asked: dict[str, Any]) -> "list[Level]":
    """The levels to measure, from the arrival option given or from the sessions' own times."""
    from kit.loadgen import plan

    requests, duration = asked["requests"], asked["duration"]
    rate, burst = asked["request_rate"], asked["burst"]
    slots = asked["concurrency"] and _values("--concurrency", asked["concurrency"], int)
    if not (rate or burst or slots):
        return [_own_times(asked)]
    if rate and slots and len(slots) > 1:
        raise UserError("--concurrency as a cap of --request-rate takes one number")
    if asked["workload"]:
        source = plan.workload_sessions(asked["workload"], asked["seed"])
    elif asked["trace"]:
        source = plan.trace_sessions(asked["trace"], asked["trace_format"])
    else:
        source = plan.fixed_sessions(asked["input_tokens"], asked["output_tokens"])
    more: dict[str, Any] = {"requests": requests, "duration_s": duration, "seed": asked["seed"]}
    kind, values = "concurrency", slots or []
    if burst:
        kind, values = "burst", _values("--burst", burst, int)
    elif rate:
        kind, values = "request_rate", _values("--request-rate", rate, float)
        more |= {"burstiness": asked["burstiness"]}
        more |= {"max_concurrency": int(slots[0]) if slots else None}
    return [plan.level(kind, value, source, **more) for value in values]


def _own_times(asked: dict[str, Any]) -> "Level":
    """A workload or trace at its own arrival times."""
    from kit import traces, workload
    from kit.loadgen import plan

    requests, duration = asked["requests"], asked["duration"]
    if asked["workload"]:
        drawn = workload.load(asked["workload"])
        arrivals = workload.generate(drawn, asked["seed"], sessions=requests, duration_s=duration)
        return plan.own_arrivals(arrivals, requests, duration)
    if asked["trace"]:
        trace = traces.read(asked["trace"], asked["trace_format"])
        if trace.shared_clock:
            return plan.own_arrivals(trace.sessions(), requests, duration)
    raise UserError("give one of --burst, --concurrency, --request-rate")


def _tell(summaries: list[dict[str, Any]], as_json: bool) -> None:
    """One summary, or several as `levels` with the largest burst that met the limits."""
    from kit.loadgen.report import text

    for summary in summaries:
        (sys.stderr if as_json else sys.stdout).write(text(summary))
    if as_json:
        passing = [s["sent"] for s in summaries if s["slo_met"] and s["level"].startswith("burst")]
        several = {"levels": summaries, "largest_passing_burst": max(passing, default=None)}
        sys.stdout.write(json.dumps(summaries[0] if len(summaries) == 1 else several) + "\n")
