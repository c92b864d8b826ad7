"""`kit load`: measure a server under a burst, a closed loop, a rate or agent sessions."""

import json
import sys
from itertools import islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from kit.cli.options import ApiKeyEnv, Json, SloTpot, SloTtft
from kit.errors import UserError, flag

if TYPE_CHECKING:
    from kit.loadgen import Level

ARRIVALS: dict[str, type[int] | type[float]] = {"burst": int, "concurrency": int, "request_rate": float}
POSITIVE = ("input_tokens", "output_tokens", "requests", "duration", "workers", "burstiness", "timeout_s",
            "speed", "slo_ttft_s", "slo_tpot_s")  # fmt: skip


def command(
    base_url: Annotated[str, Option(help="http://HOST:PORT, with or without /v1")],
    model: Annotated[str, Option(help="the model name that the server knows")],
    input_tokens: Annotated[int | None, Option(help="prompt tokens of each request")] = None,
    output_tokens: Annotated[int | None, Option(help="answer tokens of each request")] = None,
    workload: Annotated[str | None, Option(help="key of data/workloads, a YAML file or a recording")] = None,
    trace: Annotated[str | None, Option(help="trace file to replay")] = None,
    trace_format: Annotated[str | None, Option(help="azure, mooncake, weka, burstgpt, recorded")] = None,
    burst: Annotated[str | None, Option(help="N at once; 100,1000 for levels")] = None,
    concurrency: Annotated[str | None, Option(help="N streams, each goes on when it ends")] = None,
    request_rate: Annotated[str | None, Option(help="arrivals per second")] = None,
    burstiness: Annotated[float, Option(help="CV of the gaps; 1 is Poisson")] = 1.0,
    requests: Annotated[int | None, Option(help="how many requests, or sessions")] = None,
    duration: Annotated[float | None, Option(help="seconds in which they start")] = None,
    speed: Annotated[float, Option(help="divides the gaps and pauses of sessions' own times")] = 1.0,
    slo_ttft_s: SloTtft = None,
    slo_tpot_s: SloTpot = None,
    api_key_env: ApiKeyEnv = None,
    metrics_url: Annotated[str | None, Option(help="default: /metrics of the server")] = None,
    endpoint: Annotated[Literal["chat", "completions"], Option()] = "chat",
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
    summaries = measure(target, levels, Options(slo_ttft_s, slo_tpot_s, workers, metrics_url), out, asked)
    for level, summary in zip(levels, summaries, strict=True):
        if input_tokens and output_tokens:
            summary["equivalents"] = equivalents(target, level, input_tokens, output_tokens, burstiness)
        (sys.stderr if as_json else sys.stdout).write(text(summary))
    if as_json:
        passing = [s["sent"] for s in summaries if s["slo_met"] and s["level"].startswith("burst")]
        several = {"levels": summaries, "largest_passing_burst": max(passing, default=None)}
        sys.stdout.write(json.dumps(summaries[0] if len(summaries) == 1 else several) + "\n")


def _check(asked: dict[str, Any]) -> None:
    """Refuse bad and contradicting options, each named with its value."""
    for name in POSITIVE:
        value = asked[name]
        if value is not None and not 0 < value < inf:
            raise UserError(f"{flag(name)} {value}: want a number above 0")
    lengths = [asked["input_tokens"] is not None, asked["output_tokens"] is not None]
    if sum([any(lengths), asked["workload"] is not None, asked["trace"] is not None]) != 1:
        raise UserError("give one of: --input-tokens with --output-tokens, --workload, --trace")
    if any(lengths) != all(lengths):
        raise UserError("--input-tokens and --output-tokens are needed together")
    if (asked["trace"] is None) != (asked["trace_format"] is None):
        raise UserError("--trace and --trace-format are needed together")


def _values(arrivals: str, text: str) -> list[float]:
    """The levels of an option: positive numbers separated by commas."""
    try:
        values = [float(ARRIVALS[arrivals](part)) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < value < inf for value in values):
        raise UserError(f"{flag(arrivals)} {text!r}: want a number above 0, or several with commas")
    return values


def _levels(asked: dict[str, Any]) -> "list[Level]":
    """The levels to measure, from the arrival option given or from the sessions' own times."""
    from kit.loadgen import plan
    from kit.traces import read
    from kit.workload import generate, load

    requests, duration, seed = asked["requests"], asked["duration"], asked["seed"]
    given = [name for name in ARRIVALS if asked[name]]
    if len(given) > 1:
        raise UserError("--burst, --concurrency, --request-rate exclude each other")
    if given:
        if asked["workload"]:
            source = plan.workload_sessions(asked["workload"], seed)
        elif asked["trace"]:
            source = plan.trace_sessions(asked["trace"], asked["trace_format"])
        else:
            source = plan.fixed_sessions(asked["input_tokens"], asked["output_tokens"])
        more = {"requests": requests, "duration_s": duration, "burstiness": asked["burstiness"], "seed": seed}
        return [plan.level(given[0], value, source, **more) for value in _values(given[0], asked[given[0]])]
    if asked["workload"]:
        drawn = generate(load(asked["workload"]), seed, sessions=requests, duration_s=duration)
        return [plan.own_arrivals(plan.faster(drawn, asked["speed"]), duration)]
    if asked["trace"]:
        trace = read(asked["trace"], asked["trace_format"])
        if trace.shared_clock:
            return [plan.own_arrivals(plan.faster(islice(trace.sessions(), requests), asked["speed"]), duration)]
    raise UserError("give one of --burst, --concurrency, --request-rate")
