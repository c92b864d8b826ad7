"""From the workers' rows to the summary that `kit load` prints."""

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np

from kit import metrics
from kit.loadgen.plan import OPEN_LOOPS, Level
from kit.loadgen.recorder import COLUMNS
from kit.loadgen.selfcheck import OwnLag, verdict
from kit.loadgen.watch import ServerWatch
from kit.metrics import Floats, Requests, summarize

REFUSALS = ("http_429", "http_503", "http_529")
CLIENT_FAILURES = ("client_descriptors", "worker_died")
LENGTH_TOLERANCE = 0.05  # mean prompt length against the asked one

Limits = tuple[float | None, float | None]  # TTFT and TPOT, in s; None where not limited


def summarize_level(
    level: Level, results: list[dict[str, Any]], connects: list[float], lost: int, watch: ServerWatch, limits: Limits
) -> dict[str, Any]:
    """All keys of `kit load --json` for one level, from what the workers gave back."""
    # A request of a dead worker is a row of NaN.
    table = np.concatenate([*(result["rows"] for result in results), np.full((lost, len(COLUMNS)), np.nan)])
    columns = dict(zip(COLUMNS, table.T, strict=True))
    columns["scheduled_s"] = np.nan_to_num(columns["scheduled_s"])
    reasons = [reason for result in results for reason in result["reasons"]] + ["worker_died"] * lost
    ok = np.array([reason is None for reason in reasons], dtype=bool)
    requests = Requests(**{one.name: columns[one.name] for one in fields(Requests) if one.name in columns}, ok=ok)
    failures = Counter(reason for reason in reasons if reason)
    sent = _known(columns["sent_s"] - columns["due_s"])
    cpu = [result["cpu_s"] / max(result["wall_s"], 1e-9) for result in results]
    own_failures = sum(failures[name] for name in CLIENT_FAILURES)
    own = OwnLag(_joined(results, "loop_lags"), _joined(results, "read_lags"), sent, cpu, own_failures)
    server, itl = watch.result(), summarize(_joined(results, "gaps"))
    called, against = verdict(level, requests, itl["p50"], own, limits[0], server)
    unsent = sum(result["unsent_turns"] for result in results)
    burst = metrics.burst_absorption(requests, limits[0], np.isin(np.array(reasons, dtype=str), REFUSALS))
    return {
        "verdict": called, "verdict_reasons": against, "level": level.name,
        **_counts(level, requests, failures), **_lags(own), **_latencies(requests, columns, itl, connects),
        **attainment(requests, limits, called),
        "burst": burst if called == "VALID" else burst | {"largest_passing_burst": None},
        "server": server, "gpu": watch.gpus.result() if watch.gpus else None,
        "failure_details": {reason: text for result in results for reason, text in result["details"].items()},
        "client_peak_rss_bytes": sum(result["peak_rss_bytes"] for result in results),
        "unsent_turns": unsent, "warnings": _warnings(columns, ok, unsent),
    }  # fmt: skip


def _joined(results: list[dict[str, Any]], name: str) -> Floats:
    return np.concatenate([np.empty(0), *(result[name] for result in results)])


def _known(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _duration(requests: Requests) -> float:
    """Seconds from the first scheduled time to the last end; 0 where nothing ended."""
    return float(np.max(_known(requests.end_s) - requests.scheduled_s.min(), initial=0.0))


def _counts(level: Level, requests: Requests, failures: Counter[str]) -> dict[str, Any]:
    duration, completed = _duration(requests), int(requests.ok.sum())
    tokens = int(np.nansum(requests.output_tokens[requests.ok]))
    span = np.ptp(requests.scheduled_s) if level.kind in OPEN_LOOPS else 0.0
    return {
        "sent": int(np.isfinite(requests.sent_s).sum()), "completed": completed, "failed": failures.total(),
        "failures": dict(failures), "peak_in_flight": metrics.peak_in_flight(requests.sent_s, requests.end_s),
        "duration_s": duration or None,
        "output_tokens": tokens, "output_tokens_per_s": tokens / duration if duration else None,
        "requests_per_s": completed / duration if duration else None,
        "offered_requests_per_s": float((len(requests.ok) - 1) / span) if span else None,
    }  # fmt: skip


def _lags(own: OwnLag) -> dict[str, Any]:
    def spread(lags: Floats) -> dict[str, float | None]:
        values = np.quantile(lags, (0.5, 0.99, 1.0)).tolist() if len(lags) else (None, None, None)
        return dict(zip(("p50", "p99", "max"), values, strict=True))

    lags = {"send_lag_s": own.send_lags, "loop_lag_s": own.loop_lags, "read_lag_s": own.read_lags}
    return {name: spread(values) for name, values in lags.items()} | {"client_cpu_fraction": own.cpu_fractions}


def _latencies(
    requests: Requests, columns: dict[str, Floats], itl: dict[str, Any], connects: list[float]
) -> dict[str, Any]:
    ok, misses = requests.ok, int((~requests.ok).sum())
    latencies = {
        "ttft_s": requests.ttft_s(),
        "ttft_scheduled_s": requests.ttft_scheduled_s(),
        "ttft_answer_s": columns["first_answer_s"] - requests.sent_s,
        "tpot_s": requests.tpot_s(),
        "e2el_s": requests.e2el_s(),
        "e2el_scheduled_s": requests.last_token_s - requests.scheduled_s,
    }
    connect = {"before_the_run": summarize(connects), "within_requests": summarize(columns["connect_s"])}
    shown = {name: summarize(values[ok], misses) for name, values in latencies.items()}
    return shown | {"itl_s": itl, "connect_s": connect}


def attainment(requests: Requests, limits: Limits, called: str) -> dict[str, Any]:
    """Goodput and attainment; unknown, and the SLO not met, where the client was the limit."""
    names = ("goodput_requests_per_s", "slo_attainment_fraction", "slo_attainment_interval")
    unknown: dict[str, Any] = dict.fromkeys((*names, "slo_attainment_not_valid", "slo_met"))
    duration, n = _duration(requests), len(requests.ok)
    if limits == (None, None) or not duration:
        return unknown
    good = int(metrics.meets_slo(requests, *limits).sum())
    if called != "VALID":
        return unknown | {"slo_attainment_not_valid": good / n, "slo_met": False}
    values = (good / duration, good / n, metrics.wilson_interval(good, n))
    return unknown | dict(zip(names, values, strict=True)) | {"slo_met": good / n >= metrics.PASSING_ATTAINMENT}


def _warnings(columns: dict[str, Floats], ok: metrics.Bools, unsent_turns: int) -> list[str]:
    if not ok.any():
        return ["no request completed"]
    warnings = []
    got, wanted, prompts, asked = (
        columns[name][ok] for name in ("output_tokens", "asked_tokens", "prompt_tokens", "input_len")
    )
    if other := int((got != wanted).sum()):
        warnings.append(f"{other} of {ok.sum()} answers have another length than asked: mean {got.mean():.1f}")
    if np.isnan(prompts[0]):
        warnings.append("no usage from the server: tokens counted as chunks, prompt length unknown")
    elif abs(np.nanmean(prompts) / asked.mean() - 1) > LENGTH_TOLERANCE:
        warnings.append(f"prompts have {np.nanmean(prompts):.0f} tokens, asked {asked.mean():.0f}")
    if unsent_turns:
        warnings.append(f"{unsent_turns} turns were never sent: an earlier turn of theirs failed")
    return warnings
