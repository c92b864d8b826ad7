"""What a finished simulation says: latencies, sessions, cache survival, bursts, task times."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kit import metrics
from kit.simulator.loop import COLUMNS, Simulation
from kit.simulator.steps import TICKS_PER_S
from kit.workload import Session

Floats = npt.NDArray[np.float64]
PAUSES_S: tuple[float | None, ...] = (0.0, 1.0, 10.0, 60.0, 300.0, 3600.0, None)  # None: no limit
CACHED_FRACTION = 0.9  # a turn is a hit when this much of what it could reuse was cached
SERIES_POINTS = 120
MODELLED = ("ttft_s_mean", "ttft_s_p50", "tpot_s_mean", "output_tokens_per_s")
LARGEST_BURST_TRIED = 16_384


def answers(
    sim: Simulation, slo_ttft_s: float | None, slo_tpot_s: float | None, burst_keys: set[int]
) -> dict[str, Any]:
    """Every answer of one run under the names of `kit simulate --json`."""
    turns = _columns(sim)
    requests, in_burst = _requests(sim, turns, slo_ttft_s, burst_keys)
    good = metrics.meets_slo(requests, slo_ttft_s, slo_tpot_s)
    judged = len(in_burst) and (slo_ttft_s is not None or slo_tpot_s is not None)
    done = len(turns["turn"])
    misses = len(in_burst) - done
    usage = [replica.kv_cache_usage_mean(sim.now) for replica in sim.replicas]
    pools = [replica.scheduler for replica in sim.replicas]
    asked = sum(scheduler.query_tokens for scheduler in pools)
    span_s = sim.now / TICKS_PER_S
    return {
        "ttft_s": metrics.summarize(requests.ttft_s(), misses),
        "tpot_s": metrics.summarize(requests.tpot_s(), misses),
        "itl_s": {f"p{percent}": sim.intervals.percentile_s(percent) for percent in (50, 99)},
        "e2el_s": metrics.summarize(requests.e2el_s(), misses),
        "intervals": dict.fromkeys(MODELLED),  # unknown: the step time is not calibrated
        "output_tokens_per_s": float(turns["output_len"].sum()) / span_s if span_s else None,
        "requests_per_s": done / span_s if span_s else None,
        "limited_by": _limited_by(sim, turns),
        "completed": done,
        "refused": len(sim.refused),
        "unfinished": sim.planned - done - len(sim.refused),
        "turns": sim.planned,
        "refusals": sim.refusals,
        "prefix_hit_fraction": sum(s.hit_tokens for s in pools) / asked if asked else None,
        "preemptions": sum(scheduler.preemptions for scheduler in pools),
        "kv_cache_usage": {
            "mean": float(np.mean(usage)),
            "max": max(scheduler.peak_used / scheduler.pool.total for scheduler in pools),
        },
        "slo_attainment_fraction": float(good.mean()) if judged else None,
        "burst": _burst(requests, in_burst, slo_ttft_s),
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


def _columns(sim: Simulation) -> dict[str, Floats]:
    table = np.frombuffer(sim.turns, dtype=float).reshape(-1, len(COLUMNS))
    return {name: table[:, index] for index, name in enumerate(COLUMNS)}


def _requests(
    sim: Simulation, turns: dict[str, Floats], slo_ttft_s: float | None, burst_keys: set[int]
) -> tuple[metrics.Requests, metrics.Bools]:
    """Turns that can be judged (completed, refused, late in flight); which start the burst."""
    limit = float("inf") if slo_ttft_s is None else slo_ttft_s * TICKS_PER_S
    missed = sim.refused + [
        request for request in sim.in_flight.values() if len(request.times) < 3 and sim.now - request.times[0] > limit
    ]
    rest = {
        "arrival_s": [request.times[0] / TICKS_PER_S for request in missed],
        "key": [request.owner.session.key for request in missed],
        "turn": [request.owner.turn for request in missed],
        "session": [request.owner.number for request in missed],
    }

    def join(name: str) -> Floats:
        return np.concatenate([turns[name], rest.get(name, [np.nan] * len(missed))])[order]

    order = np.arange(len(turns["turn"]) + len(missed))
    order = np.lexsort((abs(join("session")), join("arrival_s")))
    arrival, end = join("arrival_s"), join("end_s")
    requests = metrics.Requests(
        scheduled_s=arrival, sent_s=arrival, first_token_s=join("first_s"), last_token_s=end,
        end_s=np.where(np.isnan(end), sim.now / TICKS_PER_S, end),
        output_tokens=np.nan_to_num(join("output_len")), ok=~np.isnan(end),
    )  # fmt: skip
    return requests, np.isin(join("key"), list(burst_keys)) & (join("turn") == 0)


def _limited_by(sim: Simulation, turns: dict[str, Floats]) -> str:
    """Where turns spend most of their time, and what they queue for."""
    moments = ("arrival_s", "admitted_s", "first_s", "end_s")
    queue, prefill, decode = (float((turns[b] - turns[a]).sum()) for a, b in pairwise(moments))
    if decode >= max(queue, prefill):
        return "decode"
    full = max(r.scheduler.peak_used / r.scheduler.pool.total for r in sim.replicas) > 0.95
    return "kv_cache" if queue > prefill and full else "prefill"


def _burst(requests: metrics.Requests, chosen: metrics.Bools, slo_ttft_s: float | None) -> dict[str, Any]:
    """How the burst was taken: the chosen turns, or else those of the busiest minute."""
    at_s = requests.scheduled_s
    if len(at_s) and not chosen.any():
        arrival = np.sort(at_s)
        within = np.searchsorted(arrival, arrival + 60.0) - np.arange(len(arrival))
        start = arrival[int(within.argmax())]
        chosen = (at_s >= start) & (at_s < start + 60.0)
    columns = (getattr(requests, field.name) for field in fields(requests)[:7])
    part = metrics.Requests(*(column[chosen] for column in columns))
    return {"requests": int(chosen.sum()), **metrics.burst_absorption(part, slo_ttft_s)}


def _sessions(turns: dict[str, Floats], span_s: float) -> dict[str, Any]:
    """Sessions that are active, queued and paused: mean and maximum over time, and a series."""
    order = np.lexsort((turns["turn"], turns["session"]))
    arrival, admitted, end = (turns[name][order] for name in ("arrival_s", "admitted_s", "end_s"))
    follows = np.diff(turns["session"][order]) == 0
    spans = {
        "active": (admitted, end),
        "queued": (arrival, admitted),
        "paused": (end[:-1][follows], arrival[1:][follows]),
    }
    grid = np.linspace(0.0, span_s, SERIES_POINTS)
    result: dict[str, Any] = {"series": {"t_s": grid.tolist()}}
    for name, (begin, stop) in spans.items():
        begin, stop = np.sort(begin), np.sort(stop)
        at = np.searchsorted(begin, grid, "right") - np.searchsorted(stop, grid, "right")
        peak = np.arange(1, len(begin) + 1) - np.searchsorted(stop, begin, "right")
        result[name] = {
            "mean": float((stop - begin).sum() / span_s) if span_s else None,
            "max": int(peak.max()) if len(peak) else 0,
        }
        result["series"][name] = at.tolist()
    held = turns["pause_s"] * turns["reusable_tokens"]
    active = (turns["end_s"] - turns["admitted_s"]) * turns["input_len"]
    result["idle_to_active_kv"] = float(held[held > 0].sum() / active.sum()) if len(held) else None
    return result


def _cache(turns: dict[str, Floats]) -> dict[str, Any]:
    """P(prefix still cached) by the pause before a turn, and TTFT of first, hit and missed turns."""
    pause_s, resumed = turns["pause_s"], turns["reusable_tokens"] > 0
    hit = resumed & (turns["hit_tokens"] >= CACHED_FRACTION * turns["reusable_tokens"])
    ttft, rows = turns["first_s"] - turns["arrival_s"], []
    for low, high in pairwise(PAUSES_S):
        chosen = resumed & (pause_s >= (low or 0.0)) & (pause_s < (high or np.inf))
        share = float(hit[chosen].mean()) if chosen.any() else None
        counted = {"turns": int(chosen.sum()), "cached_fraction": share}
        rows.append({"pause_from_s": low, "pause_to_s": high, **counted})
    mixture = {
        name: {"fraction": float(chosen.mean()) if len(chosen) else None, **metrics.summarize(ttft[chosen])}
        for name, chosen in {"first": ~resumed, "hit": hit, "miss": resumed & ~hit}.items()
    }
    return {"prefix_still_cached": rows, "ttft_mixture": mixture}


def _tasks(turns: dict[str, Floats]) -> dict[str, Any]:
    """First arrival to last token of sessions with all turns done, and the server's share of it."""
    roots = turns["session"] > 0
    session = turns["session"][roots].astype(int)
    size = int(session.max(initial=0)) + 1
    start = np.full(size, np.inf)
    np.minimum.at(start, session, turns["arrival_s"][roots])
    served = np.bincount(session, (turns["end_s"] - turns["arrival_s"])[roots], size)
    done = roots & (turns["last_turn"] == 1)
    ended = turns["session"][done].astype(int)
    task = turns["end_s"][done] - start[ended]
    share = float(served[ended].sum() / task.sum()) if task.sum() else None
    return {**metrics.summarize(task), "served_fraction": share}
