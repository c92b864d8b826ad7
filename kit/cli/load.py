"""`kit load`: measure an OpenAI-compatible server under a burst, a closed loop, a rate or sessions."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli.options import Json, SloTpot, SloTtft
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.loadgen import Level
    from kit.workload import Session

Source = Callable[[int], "list[Session]"]


def command(
    base_url: Annotated[str, typer.Option(help="http://HOST:PORT, with or without /v1")],
    model: Annotated[str, typer.Option(help="the model name that the server knows")],
    input_tokens: Annotated[int | None, typer.Option(help="prompt tokens of each request")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="answer tokens of each request")] = None,
    workload: Annotated[str | None, typer.Option(help="key of data/workloads, or a file")] = None,
    trace: Annotated[Path | None, typer.Option(help="trace file to replay")] = None,
    trace_format: Annotated[str | None, typer.Option(help="azure, mooncake, weka, burstgpt")] = None,
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
    asked["trace"] = str(trace) if trace else None
    _check(asked)
    from kit.loadgen import Target, run_levels
    from kit.loadgen.equivalents import equivalents
    from kit.loadgen.probe import calibrate
    from kit.loadgen.run import Options, Slo

    key = _key(api_key_env)
    target = Target(base_url, model, endpoint, api_key_env, timeout_s, cold_connects)
    levels = _levels(asked, _source(asked))
    salt = int.from_bytes(os.urandom(8))
    target, prompts, warnings = calibrate(target, salt, key)
    options = Options(Slo(slo_ttft_s, slo_tpot_s), workers, metrics_url)
    summaries = run_levels(target, levels, prompts, options, out, asked)
    for level, summary in zip(levels, summaries, strict=True):
        summary["warnings"] = [*warnings, *summary["warnings"]]
        if input_tokens and output_tokens:
            same = equivalents(target, level, input_tokens, output_tokens, burstiness)
            summary["equivalents"] = same
    result = summaries[0] if len(summaries) == 1 else _joined(summaries)
    _tell(result, summaries, as_json)


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


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise UserError(f"--api-key-env {name}: no such environment variable, or it is empty")
    if not key.isprintable() or not key.isascii():
        raise UserError(f"--api-key-env {name}: its value is not a key")
    return key


def _source(asked: dict[str, Any]) -> Source | None:
    """Where sessions come from when the arrival process decides their times; None: own times."""
    from kit.loadgen.plan import fixed_sessions

    if asked["input_tokens"] is not None:
        return fixed_sessions(asked["input_tokens"], asked["output_tokens"])
    return None


def _values(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    """The levels of an option: positive numbers separated by commas."""
    try:
        values = [kind(part) for part in text.split(",")]
        if min(values) <= 0 or max(values) == float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"{option} {text!r}: want a number above 0, or several with commas") from None
    return [float(value) for value in values]


def _levels(asked: dict[str, Any], source: Source | None) -> "list[Level]":
    from kit.loadgen.plan import level

    assert source is not None
    common = {"requests": asked["requests"], "duration_s": asked["duration"], "seed": asked["seed"]}
    if asked["burst"] is not None:
        sizes = _values("--burst", asked["burst"], int)
        return [level("burst", value, source, **common) for value in sizes]
    slots = asked["concurrency"] and _values("--concurrency", asked["concurrency"], int)
    if asked["request_rate"] is None:
        if not slots:
            raise UserError("give one of --burst, --concurrency, --request-rate")
        return [level("concurrency", value, source, **common) for value in slots]
    if slots and len(slots) > 1:
        raise UserError("--concurrency as a cap of --request-rate takes one number")
    cap = int(slots[0]) if slots else None
    rates = _values("--request-rate", asked["request_rate"], float)
    more = {"burstiness": asked["burstiness"], "max_concurrency": cap}
    return [level("request_rate", value, source, **common, **more) for value in rates]


def _joined(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Several levels as one object, with the largest burst that was wholly absorbed."""
    passing = [s["sent"] for s in summaries if s["slo_met"] and s["level"].startswith("burst")]
    return {"levels": summaries, "largest_passing_burst": max(passing, default=None)}


def _tell(result: dict[str, Any], summaries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    from kit.loadgen.report import text

    for summary in summaries:
        stream = sys.stderr if as_json else sys.stdout
        stream.write(text(summary))
