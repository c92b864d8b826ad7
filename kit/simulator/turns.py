"""What the turns of a simulation say about a workload: bursts, kept KV, fan-out, compute pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from kit.scheduler import StepTime
from kit.simulator.answers import columns, largest_passing_burst
from kit.simulator.loop import Simulation, SimulationConfig
from kit.simulator.steps import TICKS_PER_S
from kit.simulator.study import Load
from kit.workload import Session

# The article's compute patterns, first match wins: what is counted, and from where on it decides.
PATTERNS = (
    (2, "models or sub-agents per session", 2),
    (4, "output tokens of a call, p99", 4096),
    (3, "active sessions", 100),
)
SINGLE_AGENT = 1
Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


def play(config: SimulationConfig, step_time: StepTime, load: Load) -> Simulation:
    """The load played until its duration is over, or to its end where it has none."""
    return Simulation(replace(config, until_s=load.duration_s), step_time).run(load.stream()[0])


def table(sim: Simulation) -> pd.DataFrame:
    """One row per completed turn, with the columns of `COLUMNS`."""
    return pd.DataFrame(columns(sim))


def dispersion(times_s: Sequence[float], width_s: float) -> float:
    """Index of dispersion of counts: variance over mean of the calls per window; Poisson has 1.

    >>> dispersion([0.5, 1.5, 2.5, 3.5], 1.0), dispersion([0.1, 0.2, 0.3, 3.9], 1.0)
    (0.0, 1.5)
    """
    counts = _counts(times_s, width_s)
    return float(counts.var() / counts.mean())


def peak_calls(times_s: Sequence[float], width_s: float = 60.0) -> int:
    """Most calls within any window of that length.

    >>> peak_calls([0.0, 50.0, 59.0, 61.0])
    3
    """
    at = np.sort(np.asarray(times_s))
    return int((np.searchsorted(at, at + width_s) - np.arange(len(at))).max(initial=0))


def kept(frame: pd.DataFrame, keep_s: float) -> tuple[float, float]:
    """If KV is kept `keep_s` after each call: hit fraction of prompt tokens, idle over active KV token-seconds."""
    resumed = frame[frame["reusable_tokens"] > 0]
    hits = resumed["reusable_tokens"][resumed["pause_s"] <= keep_s].sum()
    idle = (resumed["pause_s"].clip(upper=keep_s) * resumed["reusable_tokens"]).sum()
    active = ((frame["end_s"] - frame["admitted_s"]) * frame["input_len"]).sum()
    return float(hits / frame["input_len"].sum()), float(idle / active)


def pauses(sim: Simulation, frame: pd.DataFrame) -> pd.DataFrame:
    """Begin and end of every pause and the KV tokens left behind; the end of the run ends those it cuts short."""
    rows = frame.sort_values(["session", "turn"])
    resumed = rows.groupby("session")["arrival_s"].shift(-1)
    over = (rows["last_turn"] == 1) | rows["session"].isin([request.owner.number for request in sim.refused])
    end = resumed.where(resumed.notna() | over, sim.now / TICKS_PER_S)
    spans = {"begin_s": rows["end_s"], "end_s": end, "tokens": rows["input_len"] + rows["output_len"]}
    return pd.DataFrame(spans).dropna()


def level(spans: pd.DataFrame, at_s: Sequence[float], weights: Sequence[float] | float = 1.0) -> Floats:
    """How many of the spans hold each moment, or the sum of their weights.

    >>> level(pd.DataFrame({"begin_s": [0.0, 1.0], "end_s": [2.0, 3.0]}), [0.5, 1.5, 2.5]).tolist()
    [1.0, 2.0, 1.0]
    """
    times = spans[["begin_s", "end_s"]].to_numpy().T.ravel()
    change = np.broadcast_to(weights, len(spans))
    order = np.argsort(times)
    total = np.cumsum(np.concatenate([[0.0], np.concatenate([change, -change])[order]]))
    return np.asarray(total[np.searchsorted(times[order], at_s, "right")])


def passing_burst(config: SimulationConfig, step_time: StepTime, load: Load, slo_ttft_s: float) -> int:
    """Most first calls at once of which 95 % get their first token in time on idle replicas."""
    cut = replace(config, until_s=slo_ttft_s)
    return largest_passing_burst(lambda calls: Simulation(cut, step_time).run(calls), load.first_turns)


def fan_outs(frame: pd.DataFrame) -> list[Row]:
    """By number of sub-agents: fan-outs, seconds of a mean worker and of the slowest, which the parent waits for."""
    rows = frame[frame["session"] < 0].groupby("session")
    workers = rows.agg(key=("key", "first"), start=("arrival_s", "min"), end=("end_s", "max"))
    workers["took_s"] = workers["end"] - workers["start"]
    joins = workers.groupby(["key", "start"])["took_s"].agg(["count", "mean", "max"])
    return [
        {"sub-agents": agents, "times": len(group), "mean worker s": group["mean"].mean()}
        | {"slowest s": group["max"].mean(), "provenance": "modelled"}
        for agents, group in joins.groupby("count")
    ]


def pattern(sessions: Sequence[Session], *, models: int, active: int) -> tuple[int, list[Row]]:
    """The article's compute pattern (1 to 4), and the rows of the rule that found it."""
    outputs = [turn.output_len for session in sessions for turn in session.turns]
    agents = np.mean([sum(len(turn.children) for turn in session.turns) for session in sessions])
    values = {2: max(float(models), float(agents)), 4: float(np.quantile(outputs, 0.99)), 3: float(active)}
    rows = [
        {"pattern": number, "counted": what, "value": values[number], "from": limit, "met": values[number] >= limit}
        for number, what, limit in PATTERNS
    ]
    return next((number for number, _, limit in PATTERNS if values[number] >= limit), SINGLE_AGENT), rows


def _counts(times_s: Sequence[float], width_s: float) -> npt.NDArray[np.int64]:
    """Calls in each whole window from 0."""
    windows = int(np.ceil(np.max(times_s) / width_s))
    return np.bincount((np.asarray(times_s) // width_s).astype(int), minlength=windows)


def bursts(times_s: Mapping[str, Sequence[float]]) -> list[Row]:
    """How uneven loads are: calls in the busiest 60 s, index of dispersion (IDC), share of silent seconds."""
    return [
        {"load": name, "calls": len(at), "most in 60 s": peak_calls(at)}
        | {f"IDC {width} s": dispersion(at, width) for width in (1, 60)}
        | {"silent": f"{np.mean(_counts(at, 1) == 0):.0%}", "provenance": "modelled"}
        for name, at in times_s.items()
    ]


def bodies(sessions: Sequence[Session]) -> list[Row]:
    """Percentiles of what sessions are made of: calls, tokens, pauses by kind."""
    every = [turn for session in sessions for turn in session.turns]
    values: dict[str, list[float]] = {
        "calls of a session": [len(session.turns) for session in sessions],
        "prompt of the first call": [session.input_lens()[0] for session in sessions],
        "new tokens of a later call": [turn.new_tokens for session in sessions for turn in session.turns[1:]],
        "output tokens of a call": [turn.output_len for turn in every],
    }
    for kind in sorted({turn.pause_kind for turn in every} - {""}):
        values[f"pause for {kind}, s"] = [turn.pause_after_s for turn in every if turn.pause_kind == kind]
    points = {name: np.percentile(some, (50, 90, 99)) for name, some in values.items() if some}
    return [
        {"quantity": name, "p50": at[0], "p90": at[1], "p99": at[2], "provenance": "modelled"}
        for name, at in points.items()
    ]


def growth(frame: pd.DataFrame, calls: Sequence[int] = (1, 2, 3, 5, 10, 20, 50)) -> list[Row]:
    """Mean prompt of the n-th call of a session, and how much of it the session had sent before."""
    means = frame[frame["session"] > 0].groupby("turn")[["input_len", "reusable_tokens"]].mean()
    return [
        {"call": int(turn) + 1, "tokens sent": sent, "sent before": before, "new": sent - before}
        | {"provenance": "modelled"}
        for turn, sent, before in means.itertuples()
        if turn + 1 in calls
    ]


def survival(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """P(prefix still cached) by the pause before a turn, a column for each result of `answers`."""
    columns = {name: result["prefix_still_cached"] for name, result in results.items()}
    rows = []
    for index, one in enumerate(next(iter(columns.values()))):
        low, high = one["pause_from_s"], one["pause_to_s"]
        row = {"pause s": f"{low:g} to {high:g}" if high else f"over {low:g}", "turns": one["turns"]}
        shares = {name: bins[index]["cached_fraction"] for name, bins in columns.items()}
        row |= {name: "-" if share is None else f"{share:.0%}" for name, share in shares.items()}
        rows.append(row | {"provenance": "modelled"})
    return rows


def mixture(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """TTFT of first turns, hits and misses, for each result of `answers`."""
    return [
        {"pool": name, "turn": state, "of all": f"{one['fraction']:.0%}"}
        | {f"TTFT {p} ms": one[p] and one[p] * 1e3 for p in ("p50", "p99")}
        | {"provenance": "modelled"}
        for name, result in results.items()
        for state, one in result["ttft_mixture"].items()
        if one["fraction"]
    ]
