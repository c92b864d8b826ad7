"""What a finished simulation says: latencies, sessions, cache survival, bursts, task times."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kit import metrics
from kit.simulator.loop import COLUMNS, Simulation
from kit.simulator.steps import TICKS_PER_S
from kit.workload import Session

Turns = npt.NDArray[np.void]  # COLUMNS as fields
PAUSES_S: tuple[float | None, ...] = (0.0, 1.0, 10.0, 60.0, 300.0, 3600.0, None)  # None: no limit
CACHED_FRACTION = 0.9  # a turn is a hit when this much of what it could reuse was cached
SERIES_POINTS = 120
MODELLED = ("ttft_s_mean", "ttft_s_p50", "tpot_s_mean", "output_tokens_per_s")
LARGEST_BURST_TRIED = 16_384


def answers(
    sim: Simulation, slo_ttft_s: float | None, slo_tpot_s: float | None, burst_keys: set[int]
) -> dict[str, Any]:
    """Every answer of one run under the names of `kit simulate --json`."""
    turns, span_s = columns(sim), sim.now / TICKS_PER_S
    rows = judged(sim, turns, slo_ttft_s)
    requests = as_requests(rows, span_s)
    in_burst = np.isin(rows["key"], list(burst_keys)) & (rows["turn"] == 0)
    good = metrics.meets_slo(requests, slo_ttft_s, slo_tpot_s)
    done, misses = len(turns), len(rows) - len(turns)
    has_slo = slo_ttft_s is not None or slo_tpot_s is not None
    pools = [replica.scheduler for replica in sim.replicas]
    asked = sum(scheduler.query_tokens for scheduler in pools)
    peak = max(scheduler.peak_used / scheduler.pool.total for scheduler in pools)
    return {
        "ttft_s": metrics.summarize(requests.ttft_s(), misses),
        "tpot_s": metrics.summarize(requests.tpot_s(), misses),
        "itl_s": {f"p{percent}": sim.intervals.percentile_s(percent) for percent in (50, 99)},
        "e2el_s": metrics.summarize(requests.e2el_s(), misses),
        "intervals": dict.fromkeys(MODELLED),  # unknown: errors were measured for closed loops alone
        "output_tokens_per_s": float(turns["output_len"].sum()) / span_s if span_s else None,
        "requests_per_s": done / span_s if span_s else None,
        "limited_by": _limited_by(turns, kv_cache_full=peak > 0.95),
        "completed": done,
        "refused": len(sim.refused),
        "unfinished": sim.planned - done - len(sim.refused),
        "turns": sim.planned,
        "refusals": sim.refusals,
        "prefix_hit_fraction": sum(s.hit_tokens for s in pools) / asked if asked else None,
        "preemptions": sum(scheduler.preemptions for scheduler in pools),
        "kv_cache_usage": {"mean": float(np.mean([r.kv_cache_usage_mean(sim.now) for r in sim.replicas])), "max": peak},
        "slo_attainment_fraction": _share(good) if has_slo else None,
        "burst": _burst(rows, in_burst, slo_ttft_s, span_s),
        "sessions": _sessions(turns, span_s),
        **_cache(turns),
        "task_s": _tasks(turns),
        "simulated_s": span_s,
    }


def largest_passing_burst(
    simulate: Callable[[Sequence[Session]], Simulation], draw: Callable[[int], list[Session]]
) -> int:
    """Most first turns that idle replicas take at once with 95 % in time, by bisection.

    `simulate` stops the clock at the TTFT limit; what has its first token by then was in time.
    """

    def passes(first_turns: list[Session]) -> bool:
        sim = simulate(first_turns)
        in_time = len(sim.turns) // len(COLUMNS)
        in_time += sum(len(request.times) == 3 for request in sim.in_flight.values())
        return in_time >= metrics.PASSING_ATTAINMENT * len(first_turns)

    good, bad = 0, 1
    while len(sessions := draw(bad)) == bad and bad <= LARGEST_BURST_TRIED and passes(sessions):
        good, bad = bad, 2 * bad
    bad = min(bad, len(sessions) + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes(sessions[:middle]) else (good, middle)
    return good


def columns(sim: Simulation) -> Turns:
    """The completed turns, with COLUMNS as fields."""
    return np.frombuffer(sim.turns, [(name, float) for name in COLUMNS])


def judged(sim: Simulation, turns: Turns, slo_ttft_s: float | None) -> Turns:
    """Turns that can be judged, by arrival: completed, or refused or late in flight with NaN for what never was."""
    limit = float("inf") if slo_ttft_s is None else slo_ttft_s * TICKS_PER_S
    late = (one for one in sim.in_flight.values() if len(one.times) < 3 and sim.now - one.times[0] > limit)
    missed = [*sim.refused, *late]
    rest = np.full(len(missed), np.nan, turns.dtype)
    for row, request in zip(rest, missed, strict=True):
        state, arrival_s = request.owner, request.times[0] / TICKS_PER_S
        row["session"], row["turn"], row["key"] = state.number, state.turn, state.session.key
        row["arrival_s"] = arrival_s
    both = np.concatenate([turns, rest])
    return both[np.lexsort((abs(both["session"]), both["arrival_s"]))]


def as_requests(turns: Turns, span_s: float) -> metrics.Requests:
    arrival, end = turns["arrival_s"], turns["end_s"]
    ended, tokens = np.where(np.isnan(end), span_s, end), np.nan_to_num(turns["output_len"])
    return metrics.Requests(arrival, arrival, turns["first_s"], end, ended, tokens, ~np.isnan(end))


def _limited_by(turns: Turns, *, kv_cache_full: bool) -> str:
    """Where turns spend most of their time, and what they queue for."""
    moments = ("arrival_s", "admitted_s", "first_s", "end_s")
    queue, prefill, decode = (float((turns[b] - turns[a]).sum()) for a, b in pairwise(moments))
    if decode >= max(queue, prefill):
        return "decode"
    return "kv_cache" if queue > prefill and kv_cache_full else "prefill"


def _burst(turns: Turns, chosen: metrics.Bools, slo_ttft_s: float | None, span_s: float) -> dict[str, Any]:
    """How the burst was taken: the chosen turns, or else those of the busiest minute."""
    at_s = turns["arrival_s"]
    if len(at_s) and not chosen.any():
        start_s = at_s[(np.searchsorted(at_s, at_s + 60.0) - np.arange(len(at_s))).argmax()]
        chosen = (at_s >= start_s) & (at_s < start_s + 60.0)
    taken = metrics.burst_absorption(as_requests(turns[chosen], span_s), slo_ttft_s)
    return {"requests": int(chosen.sum()), **taken}


def _sessions(turns: Turns, span_s: float) -> dict[str, Any]:
    """Sessions that are active, queued and paused: mean and maximum over time, and a series."""
    ordered = turns[np.lexsort((turns["turn"], turns["session"]))]
    arrival, admitted, end = (ordered[name] for name in ("arrival_s", "admitted_s", "end_s"))
    follows = np.diff(ordered["session"]) == 0
    paused = end[:-1][follows], arrival[1:][follows]
    spans = {"active": (admitted, end), "queued": (arrival, admitted), "paused": paused}
    grid = np.linspace(0.0, span_s, SERIES_POINTS)
    result: dict[str, Any] = {"series": {"t_s": grid.tolist()}}
    for name, (begin, stop) in spans.items():
        begin, stop = np.sort(begin), np.sort(stop)
        at = np.searchsorted(begin, grid, "right") - np.searchsorted(stop, grid, "right")
        peak = np.arange(1, len(begin) + 1) - np.searchsorted(stop, begin, "right")
        mean = float((stop - begin).sum() / span_s) if span_s else None
        result[name] = {"mean": mean, "max": int(peak.max(initial=0))}
        result["series"][name] = at.tolist()
    held = turns["pause_s"] * turns["reusable_tokens"]
    active = (turns["end_s"] - turns["admitted_s"]) * turns["input_len"]
    result["idle_to_active_kv"] = float(held[held > 0].sum() / active.sum()) if len(held) else None
    return result


def _cache(turns: Turns) -> dict[str, Any]:
    """P(prefix still cached) by the pause before a turn, and TTFT of first, hit and missed turns."""
    pause_s, resumed = turns["pause_s"], turns["reusable_tokens"] > 0
    hit = resumed & (turns["hit_tokens"] >= CACHED_FRACTION * turns["reusable_tokens"])
    ttft, rows = turns["first_s"] - turns["arrival_s"], []
    for low, high in pairwise(PAUSES_S):
        chosen = resumed & (pause_s >= (low or 0.0)) & (pause_s < (high or np.inf))
        counted = {"turns": int(chosen.sum()), "cached_fraction": _share(hit[chosen])}
        rows.append({"pause_from_s": low, "pause_to_s": high, **counted})
    kinds = {"first": ~resumed, "hit": hit, "miss": resumed & ~hit}
    mixture = {name: {"fraction": _share(kind), **metrics.summarize(ttft[kind])} for name, kind in kinds.items()}
    return {"prefix_still_cached": rows, "ttft_mixture": mixture}


def _share(values: metrics.Bools) -> float | None:
    return float(values.mean()) if len(values) else None


def _tasks(turns: Turns) -> dict[str, Any]:
    """First arrival to last token of sessions with all turns done, sub-agents' own left out."""
    first, last = (turns[(turns["session"] > 0) & chosen] for chosen in (turns["turn"] == 0, turns["last_turn"] == 1))
    first.sort(order="session")
    return metrics.summarize(last["end_s"] - first["arrival_s"][np.searchsorted(first["session"], last["session"])])
