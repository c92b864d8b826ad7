"""From the workers' columns to the summary that `kit load` prints."""

import math
from collections import Counter
from typing import Any

import numpy as np

from kit.loadgen.plan import OPEN_LOOPS, Level
from kit.loadgen.recorder import FLOATS
from kit.loadgen.selfcheck import OwnLag, p99, verdict
from kit.loadgen.watch import ServerWatch
from kit.metrics import (
    PASSING_ATTAINMENT,
    Floats,
    Requests,
    burst_absorption,
    meets_slo,
    peak_in_flight,
    summarize,
    wilson_interval,
)

REFUSALS = ("http_429", "http_503", "http_529")
CLIENT_FAILURES = ("client_descriptors", "worker_died")
LENGTH_TOLERANCE = 0.05  # mean prompt length against the asked one


Limits = tuple[float | None, float | None]  # TTFT and TPOT, in s; None where not limited


def summarize_level(
    level: Level, results: list[dict[str, Any]], connects: list[float], lost: int, watch: ServerWatch, limits: Limits
) -> dict[str, Any]:
    """All keys of `kit load --json` for one level, from what the workers gave back."""
    columns, reasons = _columns(results, lost)
    requests = _requests(columns, reasons)
    server = watch.result()
    gaps = _joined(results, "gaps")
    itl = summarize(gaps)
    failures = Counter(reason for reason in reasons if reason is not None)
    own = OwnLag(
        _joined(results, "loop_lags"),
        _joined(results, "read_lags"),
        _known(columns["sent_s"] - columns["due_s"]),
        [result["cpu_s"] / max(result["wall_s"], 1e-9) for result in results],
        sum(failures[name] for name in CLIENT_FAILURES),
    )
    called, against = verdict(level, requests, itl["p50"], own, limits[0], server)
    summary: dict[str, Any] = {"verdict": called, "verdict_reasons": against, "level": level.name}
    summary |= _counts(requests, failures)
    summary |= _lags(own) | _latencies(requests, columns, itl, connects)
    summary |= _throughput(requests, level) | _attainment(requests, limits, called)
    refused = np.array([reason in REFUSALS for reason in reasons], dtype=bool)
    summary["burst"] = burst_absorption(requests, limits[0], refused)
    if called != "VALID":
        summary["burst"]["largest_passing_burst"] = None
    gpu = watch.gpus.result() if watch.gpus else None
    summary |= {"server": server, "gpu": gpu}
    details: dict[str, str] = {}
    for result in results:
        details |= result["details"]
    peaks = [result["peak_rss_bytes"] for result in results]
    unsent = sum(result["unsent_turns"] for result in results)
    summary |= {"failure_details": details, "client_peak_rss_bytes": sum(peaks)}
    return summary | {"unsent_turns": unsent, "warnings": _warnings(columns, requests, unsent)}


def _columns(results: list[dict[str, Any]], lost: int) -> tuple[dict[str, Floats], list[str | None]]:
    """Columns of all workers together, with a row of NaN for each request of a dead worker."""
    parts = [result["columns"] for result in results]
    gone = np.full(lost, np.nan)
    columns = {name: np.concatenate([*(part[name] for part in parts), gone]) for name in FLOATS}
    columns["scheduled_s"] = np.nan_to_num(columns["scheduled_s"], nan=0.0)
    reasons = [reason for result in results for reason in result["reasons"]]
    return columns, reasons + ["worker_died"] * lost


def _requests(columns: dict[str, Floats], reasons: list[str | None]) -> Requests:
    names = ("scheduled_s", "sent_s", "first_token_s", "last_token_s", "end_s", "output_tokens")
    ok = np.array([reason is None for reason in reasons], dtype=bool)
    kept = {name: columns[name] for name in (*names, "first_chunk_tokens")}
    return Requests(**kept, ok=ok)


def _joined(results: list[dict[str, Any]], name: str) -> Floats:
    return np.concatenate([np.asarray(result[name], float) for result in results] or [np.empty(0)])


def _known(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _counts(requests: Requests, failures: Counter[str]) -> dict[str, Any]:
    return {
        "sent": int(np.isfinite(requests.sent_s).sum()),
        "completed": int(requests.ok.sum()),
        "failed": failures.total(),
        "failures": dict(failures),
        "peak_in_flight": peak_in_flight(requests.sent_s, requests.end_s),
        "duration_s": _duration(requests),
    }


def _duration(requests: Requests) -> float | None:
    ends = _known(requests.end_s)
    return float(ends.max() - requests.scheduled_s.min()) if len(ends) else None


def _lags(own: OwnLag) -> dict[str, Any]:
    def spread(values: Floats) -> dict[str, float | None]:
        if not len(values):
            return {"p50": None, "p99": None, "max": None}
        return {"p50": float(np.median(values)), "p99": p99(values), "max": float(values.max())}

    lags = {"send_lag_s": own.send_lags, "loop_lag_s": own.loop_lags, "read_lag_s": own.read_lags}
    return {name: spread(values) for name, values in lags.items()} | {"client_cpu_fraction": own.cpu_fractions}


def _latencies(
    requests: Requests, columns: dict[str, Floats], itl: dict[str, Any], connects: list[float]
) -> dict[str, Any]:
    ok = requests.ok
    misses = int((~ok).sum())
    answer = columns["first_answer_s"] - columns["sent_s"]
    cold = _known(columns["connect_s"])
    return {
        "ttft_s": summarize(requests.ttft_s()[ok], misses),
        "ttft_scheduled_s": summarize(requests.ttft_scheduled_s()[ok], misses),
        "ttft_answer_s": summarize(answer[ok], misses),
        "tpot_s": summarize(requests.tpot_s()[ok], misses),
        "itl_s": itl,
        "e2el_s": summarize(requests.e2el_s()[ok], misses),
        "e2el_scheduled_s": summarize((requests.last_token_s - requests.scheduled_s)[ok], misses),
        "connect_s": {"before_the_run": summarize(connects), "within_requests": summarize(cold)},
    }


def _throughput(requests: Requests, level: Level) -> dict[str, Any]:
    duration = _duration(requests)
    tokens = float(np.nansum(requests.output_tokens[requests.ok]))
    offered = None
    if level.kind in OPEN_LOOPS and len(requests.scheduled_s) > 1:
        span = np.ptp(requests.scheduled_s)
        offered = float((len(requests.scheduled_s) - 1) / span) if span > 0 else None
    return {
        "output_tokens": int(tokens),
        "output_tokens_per_s": tokens / duration if duration else None,
        "requests_per_s": float(requests.ok.sum() / duration) if duration else None,
        "offered_requests_per_s": offered,
    }


def _attainment(requests: Requests, limits: Limits, called: str) -> dict[str, Any]:
    """Goodput and attainment; unknown, and the SLO not met, where the client was the limit."""
    names = ("goodput_requests_per_s", "slo_attainment_fraction", "slo_attainment_interval")
    unknown: dict[str, Any] = dict.fromkeys((*names, "slo_attainment_not_valid", "slo_met"))
    duration = _duration(requests)
    if limits == (None, None) or not len(requests.ok) or not duration:
        return unknown
    good = int(meets_slo(requests, *limits).sum())
    share = good / len(requests.ok)
    if called != "VALID":
        return unknown | {"slo_attainment_not_valid": share, "slo_met": False}
    values = (good / duration, share, wilson_interval(good, len(requests.ok)))
    return unknown | dict(zip(names, values, strict=True)) | {"slo_met": share >= PASSING_ATTAINMENT}


def _warnings(columns: dict[str, Floats], requests: Requests, unsent_turns: int) -> list[str]:
    warnings = []
    ok = requests.ok
    if not ok.any():
        return ["no request completed"]
    other = int((columns["output_tokens"][ok] != columns["asked_tokens"][ok]).sum())
    if other:
        mean = columns["output_tokens"][ok].mean()
        warnings.append(f"{other} of {ok.sum()} answers have another length than asked: mean {mean:.1f}")
    prompts, asked = columns["prompt_tokens"][ok], columns["input_len"][ok]
    if math.isnan(prompts[0]):
        warnings.append("no usage from the server: tokens counted as chunks, prompt length unknown")
    elif abs(np.nanmean(prompts) / asked.mean() - 1) > LENGTH_TOLERANCE:
        warnings.append(f"prompts have {np.nanmean(prompts):.0f} tokens, asked {asked.mean():.0f}")
    if unsent_turns:
        warnings.append(f"{unsent_turns} turns were never sent: an earlier turn of theirs failed")
    return warnings
