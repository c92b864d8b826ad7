"""The coefficients with which the simulator does what the server did, held to the prior where probes do not tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kit.calibrate.probes import Floats, Measured, sessions
from kit.scheduler import SchedulerConfig
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig
from kit.simulator.answers import columns
from kit.simulator.replica import Replica
from kit.steptime import StepTime, Work
from kit.steptime.model import request_parts, step_parts

# What is moved together, and how far: each is multiplied by a square, so that one that is not there can go to 0;
# the second number is the standard deviation of its root among machines.
HOST = ("fixed", "layer", "moe_layer", "index_layer", "state_layer")
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "read": (("read", "read_e"), 0.2), "kv": (("kv", "kv8"), 0.2), "attn": (("attn",), 0.2),
    "gemm": (("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e"), 0.2), "links": (("reduce", "reduce_hop", "link"), 0.2),
    "host": (HOST, 0.4), "row": (("row",), 0.5), "prefill": (("prefill", "prefill_layer"), 0.5),
    "gemm_row": (("gemm_row",), 0.2), "chunk": (("chunk",), 1.0), "api": (("api",), 1.0), "token": (("token",), 1.0),
    "stream": (("stream",), 1.0),
}  # fmt: skip
# No published row tells these apart: seconds of one prompt in a step; a decode row's products by a prompt token's.
OWN = {"chunk": 3e-4, "gemm_row": 1.0}
NOISE = {"ttft_s": 0.03, "tpot_s": 0.01}  # of a median, in log
CLIENT_S = {"ttft_s": 5e-4, "tpot_s": 2e-5}  # what a client cannot see below
MANY, SIDES = 8, (25, 50, 75)  # from so many requests on their quartiles count too, half as much
NEAR, LEAST_S = 0.15, 1e-6  # a percentile is the mean of the requests whose rank is this near
FARTHEST = 0.02, 30.0  # bounds of the roots
STEPS, FASTEST = 24, 0.7  # of the search, and how far a root may move in one
UNSURE, SURE = 60.0, 2.0  # standard errors from which on a figure counts less: at first, and in the end
COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """One compared figure: a quantile of TTFT or TPOT among like requests of a probe, in s."""

    probe: int
    group: str
    requests: Any  # indices
    quantity: str
    percent: int
    measured_s: float

    @property
    def sigma(self) -> float:
        """Its standard error in log space, before the model's own."""
        wide = NOISE[self.quantity] * (1 if self.percent == 50 else 2)
        return float(np.hypot(wide, CLIENT_S[self.quantity] / self.measured_s))

    def moved(self, values: Floats, parts: Floats) -> tuple[float, Floats]:
        """Its log among those values, and how that follows the logs of the groups that make up `parts`."""
        chosen = self.requests[np.isfinite(values[self.requests])]
        if not len(chosen):  # refused in the simulator
            return float(np.log(self.measured_s)), np.zeros(parts.shape[1])
        near = chosen[around(values[chosen], self.percent)]
        figure = max(LEAST_S, float(values[near].mean()))
        return float(np.log(figure)), parts[near].mean(axis=0) / figure


def around(values: Floats, percent: int) -> Any:
    """Indices of the values whose rank is near that percentile: their mean is smoother than it where values cluster."""
    rank = percent / 100 * (len(values) - 1)
    near = abs(np.arange(len(values)) - rank) <= max(0.5, NEAR * len(values))
    return np.argsort(values, kind="stable")[near]


class Fit:
    """Probes of one machine against the simulator with any coefficients."""

    def __init__(
        self, work: Work, prior: Mapping[str, float], limits: SchedulerConfig, probes: Sequence[Measured]
    ) -> None:
        self.work, self.prior, self.limits = work, OWN | dict(prior), limits
        self.probes = [(one, one.chains()) for one in probes]
        self.rows = [row for number, one in enumerate(probes) for row in compared(number, one)]
        self.sigma = np.array([row.sigma for row in self.rows])
        self.measured = np.log([row.measured_s for row in self.rows])
        self.spread = np.array([spread for _, spread in GROUPS.values()])

    def coefficients(self, roots: Floats) -> dict[str, float]:
        """The prior's, with each group multiplied by the square."""
        factors = {
            name: float(by * by) for (names, _), by in zip(GROUPS.values(), roots, strict=True) for name in names
        }
        return {name: value * factors.get(name, 1.0) for name, value in self.prior.items()}

    def simulated(self, roots: Floats) -> tuple[Floats, Floats]:
        """Log of every compared figure as the simulator has it, and its derivatives by the roots."""
        steps = StepTime(self.work, self.coefficients(roots))
        played = [dict(zip(("ttft_s", "tpot_s"), play(one, chains, self.limits, steps), strict=True))
                  for one, chains in self.probes]  # fmt: skip
        told = [row.moved(*played[row.probe][row.quantity]) for row in self.rows]
        return np.array([figure for figure, _ in told]), np.array([by_log for _, by_log in told]) * 2 / roots

    def solve(self) -> Floats:
        """Roots by group: Gauss-Newton steps, in which figures that nothing fits count less and less.

        The simulator's queues make the errors jagged, so that a search which insists on descent gets caught.
        """
        roots, best = np.ones(len(GROUPS)), (np.inf, np.ones(len(GROUPS)))
        for step in range(STEPS):
            errors, slopes = self.errors(roots)
            best = min(best, (float(_robust(errors / SURE).sum()), roots), key=lambda one: one[0])
            weights = 1 / np.sqrt(np.hypot(1, errors / max(SURE, UNSURE * 0.7**step)))
            move = np.linalg.lstsq(slopes * weights[:, None], -errors * weights)[0]
            fastest = FASTEST * 0.9**step * (0.5 + roots)
            roots = np.clip(roots + np.clip(move, -fastest, fastest), *FARTHEST)
        return best[1]

    def errors(self, roots: Floats) -> tuple[Floats, Floats]:
        """Errors in standard errors, with the distances from the prior in theirs, and their derivatives."""
        log, slopes = self.simulated(roots)
        errors = np.concatenate([(log - self.measured) / self.sigma, (roots - 1) / self.spread])
        return errors, np.concatenate([slopes / self.sigma[:, None], np.diag(1 / self.spread)])

    def left_out(self, roots: Floats) -> Floats:
        """Log error of each figure had the fit not seen it, from the influence that it has on its own fit."""
        errors, slopes = self.errors(roots)
        influence = np.einsum("ij,ji->i", slopes, np.linalg.pinv(slopes))
        return np.asarray(errors / np.maximum(1 - influence, 0.05))[: len(self.rows)] * self.sigma


def _robust(errors: Floats) -> Floats:
    """Squares where small, twice the absolute value where large."""
    return np.asarray(2 * (np.hypot(1, errors) - 1))


def compared(number: int, probe: Measured) -> list[Row]:
    """Medians (and quartiles where there are many) of a probe's like requests."""
    rows, kinds = list[Row](), np.array(probe.groups())
    for group in sorted(set(kinds)):
        for quantity, values in (("ttft_s", probe.ttft_s), ("tpot_s", probe.tpot_s)):
            chosen = np.flatnonzero((kinds == group) & np.isfinite(values))
            for percent in SIDES if len(chosen) >= MANY else (50,) if len(chosen) else ():
                figure = max(LEAST_S, float(values[chosen[around(values[chosen], percent)]].mean()))
                rows.append(Row(number, str(group), chosen, quantity, percent, figure))
    return rows


class Logged(Simulation):
    """A simulation of one replica that keeps what each step, or run of steps, was made of."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.log: list[tuple[float, ...]] = []

    def _step_end(self, replica: Replica) -> None:
        batch, steps = replica.batch, replica.steps
        assert batch is not None
        chunks = [(tokens, tokens * (before + (tokens + 1) / 2), before) for _, tokens, before in batch.chunks]
        sums = map(sum, zip(*chunks, strict=True)) if chunks else (0, 0, 0)
        context = batch.context + batch.decodes * (steps - 1) / 2
        self.log.append((replica.start, replica.end, steps, len(chunks), *sums, batch.decodes, context))
        super()._step_end(replica)

    def spent_s(self, steps: StepTime, at_s: Floats) -> Floats:
        """Seconds that had gone into each group by those times, one row per time: derivatives by its logarithm."""
        start, end, count, chunks, *sums = np.array(self.log).T
        c, new, rows = steps.coefficients, sums[0], sums[3]
        parts = step_parts(steps.work, c, *sums)
        products = sum(parts[name] for name in GROUPS["gemm"][0])
        by_row = c["gemm_row"] * rows / np.maximum(1, new + c["gemm_row"] * rows)  # a derivative, in no sum of seconds
        parts |= {"chunk": c["chunk"] * chunks, "gemm_row": products * by_row}
        total = np.cumsum(count[:, None] * _by_group(parts, len(count)), axis=0)
        edges, spent = np.stack([start, end], axis=1).ravel() / TICKS_PER_S, np.insert(total, 0, 0.0, axis=0)
        return np.stack([np.interp(at_s, edges, np.stack([a[:-1], a[1:]], axis=1).ravel()) for a in spent.T], axis=1)


def _by_group(parts: Mapping[str, Floats], count: int) -> Floats:
    """Parts by coefficient summed up by group: a row for each of the `count` elements."""
    sums = [sum((parts[name] for name in names if name in parts), np.zeros(count)) for names, _ in GROUPS.values()]
    return np.stack(sums, axis=1)


Play = tuple[Floats, Floats]  # a latency of each request in s (NaN: refused), and what of it each group takes


def play(probe: Measured, chains: list[list[int]], limits: SchedulerConfig, steps: StepTime) -> tuple[Play, Play]:
    """TTFT and TPOT of every request of the probe in the simulator."""
    prompts = probe.column("prompt_tokens")
    delays = _by_group(request_parts(steps.coefficients, prompts, probe.at_once()), len(prompts))
    delay_s, counted = delays.sum(axis=1), probe.told.get("prefix_hit_fraction") != 0 or probe.slots is not None
    sim = Logged(SimulationConfig(limits if counted else replace(limits, enable_prefix_caching=False)), steps)
    table = columns(sim.run(sessions(probe, chains, delay_s)))
    place = {(key, turn): index for key, chain in enumerate(chains) for turn, index in enumerate(chain)}
    at = [place[key, turn] for key, turn in zip(table["key"], table["turn"], strict=True)]
    rest = np.where(table["output_len"] > 1, table["output_len"] - 1, np.nan)
    arrived, first, end = (sim.spent_s(steps, table[name]) for name in ("arrival_s", "first_s", "end_s"))
    seconds, parts = np.full((2, len(prompts)), np.nan), np.zeros((2, *delays.shape))
    seconds[:, at] = table["first_s"] - table["arrival_s"] + delay_s[at], (table["end_s"] - table["first_s"]) / rest
    parts[:, at] = first - arrived + delays[at], (end - first) / rest[:, None]
    return (seconds[0], parts[0]), (seconds[1], parts[1])


def factor_90(errors: Floats) -> float:
    """x/÷ factor that holds 90 % of errors like these log errors: the conformal rank among them."""
    ranked = np.sort(np.abs(errors))
    rank = min(len(ranked), int(np.ceil((len(ranked) + 1) * COVERAGE)))
    return float(np.exp(ranked[rank - 1]))


def table(fit: Fit, before: Floats, after: Floats) -> list[dict[str, Any]]:
    """What each probe said, before and after, in s."""
    rows = zip(fit.rows, np.exp(before), np.exp(after), strict=True)
    return [
        {"probe": fit.probes[row.probe][0].name, "requests_like": row.group, "quantity": row.quantity}
        | {"percentile": row.percent, "requests": len(row.requests), "measured_s": row.measured_s}
        | {"before_s": float(old), "after_s": float(new)}
        for row, old, new in rows
    ]
