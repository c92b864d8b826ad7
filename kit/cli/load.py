"""`kit load`: measure a server under a burst, a closed loop, a rate or agent sessions."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kit.cli.options import Json, SloTpot, SloTtft
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.loadgen import Level


def command(
    base_url: Annotated[str, Option(help="http://HOST:PORT, with or without /v1")],
    model: Annotated[str, Option(help="the model name that the server knows")],
    input_tokens: Annotated[int | None, Option(help="prompt tokens of each request")] = None,
    output_tokens: Annotated[int | None, Option(help="answer tokens of each request")] = None,
    workload: Annotated[str | None, Option(help="key of data/workloads, or a YAML file")] = None,
    trace: Annotated[str | None, Option(help="trace file to replay")] = None,
    trace_format: Annotated[str | None, Option(help="azure, mooncake, weka, burstgpt")] = None,
    burst: Annotated[str | None, Option(help="N at once; 100,1000 for levels")] = None,
    concurrency: Annotated[str | None, Option(help="N streams, each goes on when it ends; with a rate: a cap")] = None,
    request_rate: Annotated[str | None, Option(help="arrivals per second")] = None,
    burstiness: Annotated[float, Option(help="CV of the gaps; 1 is Poisson")] = 1.0,
    requests: Annotated[int | None, Option(help="how many requests, or sessions")] = None,
    duration: Annotated[float | None, Option(help="seconds in which they start")] = None,
    slo_ttft_s: SloTtft = None,
    slo_tpot_s: SloTpot = None,
    api_key_env: Annotated[str | None, Option(help="environment variable with the key")] = None,
    metrics_url: Annotated[str | None, Option(help="default: /metrics of the server")] = None,
    endpoint: Annotated[str, Option(help="chat or completions")] = "chat",
    cold_connects: Annotated[bool, Option("--cold-connects", help="one for each request")] = False,
    timeout_s: Annotated[float, Option(help="a longer request is a failure")] = 600.0,
    workers: Annotated[int | None, Option(help="processes; default by streams")] = None,
    seed: Annotated[int, Option(help="of arrivals and sessions")] = 0,
    out: Annotated[Path | None, Option(help="folder for requests.jsonl and results")] = None,
    as_json: Json = False,
) -> None:
    """Load-test a server and say whether this client's numbers can be believed."""
    asked = {name: value for name, value in locals().items() if name not in ("out", "as_json")}
    _check(asked)
    from kit.loadgen import Options, Target, measure
    from kit.loadgen.report import equivalents, text

    target = Target(base_url, model, endpoint, api_key_env, timeout_s, cold_connects)
    levels = _levels(asked)
    options = Options(slo_ttft_s, slo_tpot_s, workers, metrics_url)
    summaries = measure(target, levels, options, out, asked)
    for level, summary in zip(levels, summaries, strict=True):
        if input_tokens and output_tokens:
            same = equivalents(target, level, input_tokens, output_tokens, burstiness)
            summary["equivalents"] = same
        (sys.stderr if as_json else sys.stdout).write(text(summary))
    if as_json:
        passing = [s["sent"] for s in summaries if s["slo_met"] and s["level"].startswith("burst")]
        several = {"levels": summaries, "largest_passing_burst": max(passing, default=None)}
        sys.stdout.write(json.dumps(summaries[0] if len(summaries) == 1 else several) + "\n")


def _check(asked: dict[str, Any]) -> None:
    """Refuse bad and contradicting options, each named with its value."""
    for name in ("input_tokens", "output_tokens", "requests", "duration", "workers", "burstiness",
                 "timeout_s", "slo_ttft_s", "slo_tpot_s"):  # fmt: skip
        value = asked[name]
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: want a number above 0")
    if asked["endpoint"] not in ("chat", "completions"):
        raise UserError(f"--endpoint {asked['endpoint']!r}: choices: chat, completions")
    lengths = [asked["input_tokens"] is not None, asked["output_tokens"] is not None]
    if sum([any(lengths), asked["workload"] is not None, asked["trace"] is not None]) != 1:
        raise UserError("give one of: --input-tokens with --output-tokens, --workload, --trace")
    if any(lengths) != all(lengths):
        raise UserError("--input-tokens and --output-tokens are needed together")
    if (asked["trace"] is None) != (asked["trace_format"] is None):
        raise UserError("--trace and --trace-format are needed together")
    if asked["burst"] and (asked["request_rate"] or asked["concurrency"]):
        raise UserError("--burst excludes --concurrency and --request-rate")
    name = asked["api_key_env"]
    if name is not None and not (os.environ.get(name) and os.environ[name].isprintable()):
        raise UserError(f"--api-key-env {name}: no such environment variable, or no key in it")


def _values(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """The levels of an option: positive numbers separated by commas."""
    try:
        values = [float(kind(part)) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < value < float("inf") for value in values):
        raise UserError(f"{option} {text!r}: want a number above 0, or several with commas")
    return values


def _levels(asked: dict[str, Any]) -> "list[Level]":
    """The levels to measure, from the arrival option given or from the sessions' own times."""
    from kit.loadgen import plan
    from kit.traces import read
    from kit.workload import generate, load

    requests, duration, seed = asked["requests"], asked["duration"], asked["seed"]
    rate, burst, streams = asked["request_rate"], asked["burst"], asked["concurrency"]
    if asked["workload"]:
        source = plan.workload_sessions(asked["workload"], seed)
    elif asked["trace"]:
        source = plan.trace_sessions(asked["trace"], asked["trace_format"])
    else:
        source = plan.fixed_sessions(asked["input_tokens"], asked["output_tokens"])
    more: dict[str, Any] = {"requests": requests, "duration_s": duration, "seed": seed}
    slots = _values("--concurrency", streams, int) if streams else []
    if rate:
        if len(slots) > 1:
            raise UserError("--concurrency as a cap of --request-rate takes one number")
        more |= {"burstiness": asked["burstiness"], "max_concurrency": int(sum(slots)) or None}
        rates = _values("--request-rate", rate, float)
        return [plan.level("request_rate", value, source, **more) for value in rates]
    if burst:
        sizes = _values("--burst", burst, int)
        return [plan.level("burst", value, source, **more) for value in sizes]
    if slots:
        return [plan.level("concurrency", value, source, **more) for value in slots]
    if asked["workload"]:
        workload = load(asked["workload"])
        drawn = generate(workload, seed, sessions=requests, duration_s=duration)
        return [plan.own_arrivals(list(drawn), duration)]
    if asked["trace"]:
        trace = read(asked["trace"], asked["trace_format"])
        if trace.shared_clock:
            return [plan.own_arrivals(list(trace.sessions())[:requests], duration)]
    raise UserError("give one of --burst, --concurrency, --request-rate")
