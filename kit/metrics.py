"""TTFT, ITL, TPOT, E2EL, goodput, attainment and burst absorption, each defined once.

Pure functions on arrays of seconds, shared by the load generator, the simulator and the emulator.
A request that failed, was refused or was cut off is a miss: it ranks above every measured value in
a percentile and never meets an SLO. docs/glossary.md compares these definitions with other tools.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

QUANTILES = (("p50", 0.50), ("p90", 0.90), ("p95", 0.95), ("p99", 0.99))
Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution
PASSING_ATTAINMENT = 0.95  # a burst passes when this fraction of it meets the SLO


@dataclass
class Requests:
    """Columns over requests on one clock, in seconds; NaN where something never happened."""

    scheduled_s: Floats
    sent_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    end_s: Floats  # the answer ended or the request failed
    output_tokens: Floats
    ok: Bools
    first_chunk_tokens: Floats | None = None  # tokens in the first chunk; None means 1 each

    def ttft_s(self) -> Floats:
        """Time to first token from the send, in s; NaN without one."""
        return self.first_token_s - self.sent_s

    def ttft_scheduled_s(self) -> Floats:
        """Time to first token from the scheduled time, in s: waiting inside the client counts."""
        return self.first_token_s - self.scheduled_s

    def tpot_s(self) -> Floats:
        """Time per output token after the first chunk, in s; NaN for a one-chunk answer."""
        first_chunk = 1.0 if self.first_chunk_tokens is None else self.first_chunk_tokens
        after_first = self.output_tokens - first_chunk
        with np.errstate(divide="ignore", invalid="ignore"):
            spent = (self.last_token_s - self.first_token_s) / after_first
        return np.where(after_first > 0, spent, np.nan)

    def e2el_s(self) -> Floats:
        """End-to-end latency, send to last token, in s."""
        return self.last_token_s - self.sent_s


def token_gaps(times_s: Floats, tokens_in_chunk: Floats | None = None, output_tokens: int | None = None) -> Floats:
    """Inter-token latencies of one answer, in s; a chunk of k tokens gives k equal gaps.

    Without a count per chunk, more `output_tokens` than chunks are spread evenly over the chunks.

    >>> token_gaps(np.array([0.0, 0.5, 1.5]), np.array([1.0, 1.0, 2.0])).tolist()
    [0.5, 0.5, 0.5]
    >>> token_gaps(np.array([0.0, 0.5, 1.5]), output_tokens=6).tolist()
    [0.25, 0.5]
    """
    gaps = np.diff(times_s)
    if tokens_in_chunk is not None:
        counts = np.maximum(tokens_in_chunk[1:], 1)
        return np.repeat(gaps / counts, counts.astype(int))
    if output_tokens and output_tokens > len(times_s):
        return gaps * (len(times_s) / output_tokens)
    return gaps


def summarize(values: npt.ArrayLike, misses: int = 0) -> dict[str, Any]:
    """Mean of what was measured and percentiles in which each miss counts as +inf.

    A percentile is None, with the reason in `nulls`, where it falls among the misses or where fewer
    than one sample is expected beyond it (p99 needs 100): it would only restate the maximum.

    >>> summarize([1.0, 2.0, 3.0], misses=1)["p50"]
    2.5
    >>> summarize([1.0] * 98, misses=2)["nulls"]["p99"]
    'falls among the 2 misses'
    """
    measured = np.asarray(values, dtype=float)
    measured = np.sort(measured[np.isfinite(measured)])
    result: dict[str, Any] = {"mean": float(measured.mean()) if len(measured) else None}
    told = {name: _quantile(measured, misses, quantile) for name, quantile in QUANTILES}
    result |= {name: value for name, (value, _) in told.items()}
    nulls = {name: reason for name, (_, reason) in told.items() if reason}
    result |= {"max": float(measured[-1]) if len(measured) and not misses else None}
    return result | {"n": len(measured) + misses, "misses": misses, "nulls": nulls}


def _quantile(measured: Floats, misses: int, quantile: float) -> tuple[float | None, str | None]:
    total = len(measured) + misses
    needed = round(1 / (1 - quantile))
    if total == 0:
        return None, "no samples"
    if total < needed:
        return None, f"needs {needed} samples, has {total}"
    position = quantile * (total - 1)
    below, above = math.floor(position), math.ceil(position)
    if above >= len(measured):
        return None, f"falls among the {misses} misses"
    part = position - below
    return float(measured[below] * (1 - part) + measured[above] * part), None


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float] | None:
    """Wilson score interval of a fraction, 95 % by default; None without trials.

    >>> [round(edge, 3) for edge in wilson_interval(95, 100)]
    [0.888, 0.978]
    """
    if trials == 0:
        return None
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def meets_slo(
    requests: Requests, slo_ttft_s: float | None, slo_tpot_s: float | None, *, from_send: bool = False
) -> Bools:
    """Which requests meet every limit given; TTFT counts from the schedule unless `from_send`."""
    good = requests.ok.copy()
    if slo_ttft_s is not None:
        ttft = requests.ttft_s() if from_send else requests.ttft_scheduled_s()
        good &= np.nan_to_num(ttft, nan=np.inf) <= slo_ttft_s
    if slo_tpot_s is not None:
        good &= np.nan_to_num(requests.tpot_s(), nan=0.0) <= slo_tpot_s
    return good


def peak_in_flight(start_s: Floats, end_s: Floats) -> int:
    """Most requests open at one time; one that ends as another starts does not overlap it.

    >>> peak_in_flight(np.array([0.0, 1.0, 2.0]), np.array([1.5, 2.0, 3.0]))
    2
    """
    known = np.isfinite(start_s) & np.isfinite(end_s)
    times = np.concatenate([start_s[known], end_s[known]])
    steps = np.concatenate([np.ones(known.sum()), -np.ones(known.sum())])
    running = np.cumsum(steps[np.lexsort((steps, times))])
    return int(running.max()) if len(running) else 0


def burst_absorption(requests: Requests, slo_ttft_s: float | None, refused: Bools | None = None) -> dict[str, Any]:
    """How a step of load was taken: TTFT by arrival rank, recovery, backlog, shed fraction.

    `backlog_request_s` is the area under "requests waiting for a first token". `time_to_recover_s`
    runs from the first arrival to the last first token that came later than the SLO; None if some
    request never got one. `largest_passing_burst` is the largest n whose first n arrivals meet the
    TTFT limit for 95 %; they competed with all later ones, so a burst of n alone does no worse.
    """
    order = np.lexsort((requests.sent_s, requests.scheduled_s))
    ok, ttft = requests.ok[order], requests.ttft_scheduled_s()[order]
    ttft = np.where(ok, ttft, np.inf)
    waited = np.where(ok, ttft, (requests.end_s - requests.scheduled_s)[order])
    result: dict[str, Any] = {
        "ttft_by_rank_s": _by_rank(ttft),
        "backlog_request_s": float(np.nansum(waited)),
        "shed_fraction": float(refused.mean()) if refused is not None and len(refused) else None,
        "time_to_recover_s": None,
        "largest_passing_burst": None,
    }
    if slo_ttft_s is None or not len(ttft):
        return result
    late = ttft > slo_ttft_s
    if np.isfinite(ttft).all():
        arrived = requests.scheduled_s[order]
        result["time_to_recover_s"] = float((arrived + ttft)[late].max() - arrived[0] if late.any() else 0.0)
    share = np.cumsum(~late) / np.arange(1, len(late) + 1)
    passing = np.flatnonzero(share >= PASSING_ATTAINMENT)
    result["largest_passing_burst"] = int(passing[-1]) + 1 if len(passing) else 0
    return result


def _by_rank(ttft_s: Floats, parts: int = 10) -> list[dict[str, Any]]:
    """Median TTFT and misses of each tenth of the arrivals, in order of arrival."""
    rows = []
    edges = np.linspace(0, len(ttft_s), min(parts, len(ttft_s)) + 1).astype(int).tolist()
    for first, stop in pairwise(edges):
        tenth = np.sort(ttft_s[first:stop]).tolist()
        p50, worst = (value if math.isfinite(value) else None for value in (tenth[(len(tenth) - 1) // 2], tenth[-1]))
        ranks = {"rank_from": first + 1, "rank_to": stop, "p50": p50, "max": worst}
        rows.append(ranks | {"misses": tenth.count(math.inf)})
    return rows
