"""The coefficients with which the simulator does what the server did, held to the prior where probes do not tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kit.calibrate.probes import Floats, Measured, latencies
from kit.scheduler import SchedulerConfig
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig
from kit.simulator.answers import columns
from kit.simulator.replica import Replica
from kit.steptime import StepTime, Work
from kit.steptime.model import request_parts, step_parts

# What is moved together, and how far: each is multiplied by a square, so that one that is not there can go to 0;
# the number is the standard deviation of its root among machines.
GROUPS: dict[str, tuple[float, tuple[str, ...]]] = {
    "read": (0.2, ("read", "read_e")), "kv": (0.2, ("kv", "kv8")), "attn": (0.2, ("attn",)),
    "gemm": (0.2, ("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e")), "links": (0.2, ("reduce", "reduce_hop", "link")),
    "host": (0.4, ("fixed", "layer", "moe_layer", "index_layer", "state_layer")), "row": (0.5, ("row",)),
    "prefill": (0.5, ("prefill", "prefill_layer")), "gemm_row": (0.2, ("gemm_row",)), "chunk": (1.0, ("chunk",)),
    "api": (1.0, ("api",)), "token": (1.0, ("token",)), "stream": (1.0, ("stream",)),
}  # fmt: skip
SPREAD = np.array([spread for spread, _ in GROUPS.values()])
# No published row tells these apart: seconds of one prompt in a step; a decode row's products by a prompt token's.
OWN = {"chunk": 3e-4, "gemm_row": 1.0}
NOISE = {"ttft_s": (0.03, 5e-4), "tpot_s": (0.01, 2e-5)}  # of a median in log, and what a client cannot see below in s
DOUBTED = {"VALID": 1.0, "CLIENT_BOUND": 3.0}  # the same where many streams were too much for the client
MANY, SIDES = 8, {50: 1, 25: 2, 75: 2}  # from so many requests on their quartiles count too, half as much
NEAR = 0.15  # a percentile is the mean of the requests whose rank is this near: smoother where values cluster
STEPS, FASTEST, BOUNDS = 24, 1.0, (0.02, 300.0)  # of the search, how far a root moves in one, and where it may be
UNSURE, SURE = 60.0, 2.0  # standard errors from which on a figure counts less: at first, and in the end
COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """One compared figure: about a percentile of TTFT or TPOT among like requests of a probe, in s."""

    probe: int
    group: str
    requests: Any  # indices
    quantity: str
    percent: int
    measured_s: float
    sigma: float  # its standard error in log

    def simulated(self, values: Floats, parts: Floats) -> tuple[float, Floats]:
        """Its log among those values, and its derivatives by the logs of the groups that make up `parts`."""
        chosen = self.requests[np.isfinite(values[self.requests])]
        if not len(chosen):  # refused in the simulator
            return float(np.log(self.measured_s)), np.zeros(parts.shape[1])
        near = chosen[around(values[chosen], self.percent)]
        return float(np.log(values[near].mean())), parts[near].mean(axis=0) / values[near].mean()


def around(values: Floats, percent: int) -> Any:
    """Indices of the values whose rank is near that percentile."""
    near = abs(np.arange(len(values)) - percent / 100 * (len(values) - 1)) <= max(0.5, NEAR * len(values))
    return np.argsort(values, kind="stable")[near]


def compared(number: int, probe: Measured) -> list[Row]:
    """Medians (and quartiles where there are many) of a probe's like requests."""
    frame, rows = probe.frame, []
    doubt = 1.0 if probe.slots == 1 else DOUBTED[probe.told["verdict"]]
    for quantity, (noise, least_s) in NOISE.items():
        groups = frame[frame[quantity] > 0].groupby("group")[quantity]
        apart = scatter(groups) if probe.slots == 1 else 0.0
        for group, values in groups:
            for percent, factor in SIDES.items() if len(values) >= MANY else ((50, 1),):
                figure = float(values.iloc[around(values.to_numpy(), percent)].mean())
                own = np.hypot(noise * doubt, apart / np.sqrt(len(values)))
                sigma = np.hypot(factor * own, least_s / figure)
                rows.append(Row(number, str(group), values.index.to_numpy(), quantity, percent, figure, sigma))
    return rows


def scatter(groups: Any) -> float:
    """Standard deviation in log of requests that are alike and alone, over all groups: chance, and nothing else."""
    off = groups.transform(lambda values: np.log(values / values.median()))
    return float(np.sqrt((off**2).sum() / max(1, len(off) - len(groups))))


class Fit:
    """Probes of one machine against the simulator with any coefficients."""

    def __init__(
        self, work: Work, prior: Mapping[str, float], limits: SchedulerConfig, probes: Sequence[Measured], far: float
    ) -> None:
        self.work, self.prior, self.limits, self.spread = work, OWN | dict(prior), limits, SPREAD * far
        self.probes = [(one, one.chains()) for one in probes]
        self.rows = [row for number, one in enumerate(probes) for row in compared(number, one)]
        self.sigma = np.array([row.sigma for row in self.rows])
        self.measured = np.log([row.measured_s for row in self.rows])

    def coefficients(self, roots: Floats) -> dict[str, float]:
        """The prior's, with each group multiplied by the square."""
        groups = zip(roots, GROUPS.values(), strict=True)
        return self.prior | {n: self.prior[n] * float(root * root) for root, (_, names) in groups for n in names}

    def simulated(self, roots: Floats) -> tuple[Floats, Floats]:
        """Log of every compared figure as the simulator has it, and its derivatives by the roots."""
        steps = StepTime(self.work, self.coefficients(roots))
        played = [play(one, chains, self.limits, steps) for one, chains in self.probes]
        told = [row.simulated(*played[row.probe][row.quantity]) for row in self.rows]
        return np.array([log for log, _ in told]), np.array([by_log for _, by_log in told]) * 2 / roots

    def errors(self, roots: Floats) -> tuple[Floats, Floats]:
        """Errors in standard errors, with the distances from the prior in theirs, and their derivatives."""
        log, slopes = self.simulated(roots)
        far = np.where(roots > 1, np.log(roots), roots - 1)
        errors = np.concatenate([(log - self.measured) / self.sigma, far / self.spread])
        return errors, np.concatenate([slopes / self.sigma[:, None], np.diag(1 / (self.spread * np.maximum(1, roots)))])

    def solve(self) -> Floats:
        """Roots by group: Gauss-Newton steps, in which figures that nothing fits count less and less.

        The simulator's queues make the errors jagged, so that a search which insists on descent gets caught.
        """
        roots, best = np.ones(len(GROUPS)), (np.inf, np.ones(len(GROUPS)))
        for step in range(STEPS):
            errors, slopes = self.errors(roots)
            best = min(best, (float(np.hypot(1, errors / SURE).sum()), roots), key=lambda one: one[0])
            weights = np.hypot(1, errors / max(SURE, UNSURE * 0.7**step)) ** -0.5
            move = np.linalg.lstsq(slopes * weights[:, None], -errors * weights)[0]
            fastest = FASTEST * 0.9**step * (0.5 + roots)
            roots = np.clip(roots + np.clip(move, -fastest, fastest), *BOUNDS)
        return best[1]

    def factors_90(self, roots: Floats) -> dict[str, float]:
        """x/÷ factors that hold 90 % of each quantity's errors, had the fit not seen them (from their influence).

        They are no narrower than the noise of a figure: other loads err where no probe was.
        """
        errors, slopes = self.errors(roots)
        influence = np.einsum("ij,ji->i", slopes, np.linalg.pinv(slopes))
        alone = np.abs(errors / np.maximum(1 - influence, 0.05))[: len(self.rows)] * self.sigma
        ranked = {name: np.sort(alone[[row.quantity == name for row in self.rows]]) for name in NOISE}
        rank = {name: min(len(some), int(np.ceil((len(some) + 1) * COVERAGE))) for name, some in ranked.items()}
        return {name: float(np.exp(max(NOISE[name][0], some[rank[name] - 1]))) for name, some in ranked.items()}

    def table(self, roots: Floats) -> list[dict[str, Any]]:
        """What each probe said, before and after, in s."""
        before, after = (np.exp(self.simulated(one)[0]).tolist() for one in (np.ones(len(GROUPS)), roots))
        return [
            {"probe": self.probes[row.probe][0].name, "group": row.group, "quantity": row.quantity,
             "percentile": row.percent, "requests": len(row.requests), "measured_s": row.measured_s,
             "before_s": old, "after_s": new}
            for row, old, new in zip(self.rows, before, after, strict=True)
        ]  # fmt: skip


class Logged(Simulation):
    """A simulation of one replica that keeps what each step, or run of steps, was made of."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.log: list[tuple[float, ...]] = []

    def _step_end(self, replica: Replica) -> None:
        batch, steps = replica.batch, replica.steps
        assert batch is not None
        chunks = [(tokens, tokens * (before + (tokens + 1) / 2), before) for _, tokens, before in batch.chunks]
        sums = map(sum, zip((0, 0, 0), *chunks, strict=True))
        context = batch.context + batch.decodes * (steps - 1) / 2
        self.log.append((replica.start, replica.end, steps, len(chunks), *sums, batch.decodes, context))
        super()._step_end(replica)

    def spent_s(self, steps: StepTime, at_s: Floats) -> Floats:
        """Seconds that had gone into each group by those times, one row per time: derivatives by its logarithm."""
        start, end, count, chunks, *sums = np.array(self.log).T
        c, new, rows = steps.coefficients, sums[0], sums[3]
        parts = step_parts(steps.work, c, *sums) | {"chunk": c["chunk"] * chunks}
        by_row = c["gemm_row"] * rows / np.maximum(1, new + c["gemm_row"] * rows)
        parts["gemm_row"] = by_row * sum(parts[name] for name in GROUPS["gemm"][1])  # in no sum of seconds
        total = np.insert(np.cumsum(count * _by_group(parts, len(count)), axis=1), 0, 0.0, axis=1)
        edges = np.stack([start, end], axis=1).ravel() / TICKS_PER_S
        return np.stack([np.interp(at_s, edges, np.repeat(a, 2)[1:-1]) for a in total])


def _by_group(parts: Mapping[str, Floats], count: int) -> Floats:
    """Parts by coefficient summed up by group, a row each."""
    return np.array([sum((parts[n] for n in names if n in parts), np.zeros(count)) for _, names in GROUPS.values()])


def play(
    probe: Measured, chains: list[list[int]], limits: SchedulerConfig, steps: StepTime
) -> dict[str, tuple[Floats, Floats]]:
    """TTFT and TPOT of the probe's requests in the simulator (NaN: refused), and what of it each group takes, in s."""
    frame = probe.frame
    delays = _by_group(request_parts(steps.coefficients, frame["prompt_tokens"], frame["at_once"]), len(frame))
    cached = probe.slots is not None or probe.told.get("prefix_hit_fraction") != 0
    sim = Logged(SimulationConfig(replace(limits, enable_prefix_caching=cached), request_s=None), steps)  # in `delays`
    table = columns(sim.run(probe.sessions(chains, delays.sum(axis=0))))
    at = np.array([chains[int(key)][int(turn)] for key, turn in zip(table["key"], table["turn"], strict=True)], int)
    sent, first, end = (table[name] for name in ("arrival_s", "first_s", "end_s"))
    before, until, over = (sim.spent_s(steps, when) for when in (sent, first, end))
    ttft, tpot = latencies(sent - delays.sum(axis=0)[at], first, end, table["output_len"])
    by = delays[:, at] + until - before, (over - until) * (tpot / np.maximum(end - first, 1e-12))
    told = {}
    for quantity, some, parts in zip(NOISE, (ttft, tpot), by, strict=True):
        told[quantity] = np.full(len(frame), np.nan), np.zeros((len(frame), len(GROUPS)))
        told[quantity][0][at], told[quantity][1][at] = some, parts.T
    return told
