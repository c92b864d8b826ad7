"""VALID or CLIENT_BOUND: can the numbers of this run be believed, whatever the server did."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kit.loadgen.plan import Level
from kit.metrics import Floats, Requests, meets_slo

# Read lag: bytes waiting in the kernel until this client took them. Their stamps stay right, but
# reads that merge and sends that wait do not: a quarter of what is measured is no longer small.
LAG_FRACTION = 0.25
LAG_FLOOR_S = 0.005  # loop timers have a grain of 1 ms; below 5 ms lag is jitter of any machine
# A loop this busy has queues of its own making (at 0.85 a random queue is 6 deep).
CPU_FRACTION = 0.85
# A burst is sent as fast as one core can write: about 10 us per request, and 10 us for reading.
BURST_SEND_S = 20e-6
SEND_LAG_FLOOR_S = 0.010
# More than this share missing the TTFT limit only through late sending decides a result.
OWN_MISSES_FRACTION = 0.01
ACHIEVED_FRACTION = 0.99
# Client against server histogram: a difference beyond both is not network jitter.
HISTOGRAM_FRACTION, HISTOGRAM_FLOOR_S = 0.25, 0.020


@dataclass
class OwnLag:
    """What the workers measured of themselves, in seconds and CPU shares."""

    loop_lags: Floats
    read_lags: Floats  # empty where the kernel gives no stamps
    send_lags: Floats
    cpu_fractions: list[float]
    client_failures: int = 0


def verdict(
    level: Level, requests: Requests, itl_p50_s: float | None, own: OwnLag, slo_ttft_s: float | None,
    server: dict[str, Any],
) -> tuple[str, list[str]]:  # fmt: skip
    """The verdict and the reasons against this client; empty when VALID."""
    ttft = requests.ttft_s()[requests.ok]
    measured = [float(np.median(ttft))] if len(ttft) else []
    read, name = (own.read_lags, "read lag") if len(own.read_lags) else (own.loop_lags, "loop lag")
    shortest = min([*measured, itl_p50_s] if itl_p50_s else measured, default=0.0)
    reasons = _over(name, read, LAG_FLOOR_S, LAG_FRACTION * shortest)
    at_once = BURST_SEND_S * (level.slots or (len(level.sessions) if level.kind == "burst" else 0))
    reasons += _over("send lag", own.send_lags, SEND_LAG_FLOOR_S, LAG_FRACTION * sum(measured), at_once)
    if slo_ttft_s is not None and level.max_concurrency is None and len(requests.ok):
        late = meets_slo(requests, slo_ttft_s, None, from_send=True) & ~meets_slo(requests, slo_ttft_s, None)
        if late.mean() > OWN_MISSES_FRACTION:
            reasons.append(f"{late.mean():.1%} of requests miss the TTFT limit by late sending only")
    if own.client_failures > (1 - ACHIEVED_FRACTION) * len(requests.ok):
        reasons.append(f"{own.client_failures} requests failed in this client (descriptors, workers)")
    reasons += _histogram(ttft, own, server)
    busiest = max(own.cpu_fractions, default=0.0)
    if busiest > CPU_FRACTION:
        reasons.append(f"a worker used {busiest:.0%} of a core (limit {CPU_FRACTION:.0%})")
    return ("CLIENT_BOUND" if reasons else "VALID"), reasons


def p99(values: Floats) -> float:
    """99th percentile in s of the client's own lags, 0 without any."""
    return float(np.percentile(values, 99)) if len(values) else 0.0


def _over(name: str, lags: Floats, *limits_s: float) -> list[str]:
    lag, limit = p99(lags), max(limits_s)
    return [f"{name} p99 {lag * 1e3:.1f} ms is over {limit * 1e3:.1f} ms"] if lag > limit else []


def _histogram(ttft_s: Floats, own: OwnLag, server: dict[str, Any]) -> list[str]:
    """Client TTFT against the server's; a gap that this client's stamps rule out is not its own."""
    told = server.get("ttft_mean_s")
    if told is None or not len(ttft_s):
        return []
    gap = float(np.mean(ttft_s)) - told
    if gap <= max(HISTOGRAM_FLOOR_S, HISTOGRAM_FRACTION * told):
        return []
    where = f"client TTFT mean {told + gap:.3f} s, server histogram {told:.3f} s"
    if not len(own.read_lags):
        return [f"{where}, and no kernel stamps to show that the gap is not this client's"]
    return [] if p99(own.read_lags) < gap / 2 else [f"{where}: this client's read lag explains it"]
