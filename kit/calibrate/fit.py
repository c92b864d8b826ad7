"""The coefficients with which the simulator does what the server did, held to the prior where probes do not tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kit.calibrate.probes import Floats, Measured, sessions
from kit.scheduler import SchedulerConfig
from kit.simulator import Simulation, SimulationConfig
from kit.simulator.answers import columns
from kit.steptime import StepTime, Work

# What is moved together, and by how much (log) a machine may plausibly differ from the published ones.
HOST = ("fixed", "layer", "moe_layer", "index_layer", "state_layer")
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "read": (("read", "read_e"), 0.4), "kv": (("kv", "kv8"), 0.4), "attn": (("attn",), 0.4),
    "gemm": (("gemm_bf16", "gemm_fp8", "gemm_fp4", "gemm_e"), 0.4), "links": (("reduce", "reduce_hop", "link"), 0.4),
    "host": (HOST, 0.7), "row": (("row",), 1.0), "prefill": (("prefill", "prefill_layer"), 1.0),
    "chunk": (("chunk",), 2.0), "api": (("api",), 1.5), "token": (("token",), 1.5), "stream": (("stream",), 1.5),
}  # fmt: skip
CHUNK_S = 3e-4  # of one prompt in a step: no published row tells it apart, so its prior is wide
NOISE = {"ttft_s": 0.03, "tpot_s": 0.01}  # of a median, in log
CLIENT_S = {"ttft_s": 5e-4, "tpot_s": 2e-5}  # what a client cannot see below
MANY, SIDES = 8, (25, 50, 75)  # from so many requests on their quartiles count too, half as much
STEP, FARTHEST = 0.03, 7.0  # in log: of the derivatives, and bounds
COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """One compared figure: a quantile of TTFT or TPOT among like requests of a probe, in s."""

    probe: str
    group: str
    quantity: str
    percent: int
    requests: int
    measured_s: float

    @property
    def sigma(self) -> float:
        """Its standard error in log space, before the model's own."""
        wide = NOISE[self.quantity] * (1 if self.percent == 50 else 2)
        return float(np.hypot(wide, CLIENT_S[self.quantity] / self.measured_s))


class Fit:
    """Probes of one machine against the simulator with any coefficients."""

    def __init__(
        self, work: Work, prior: Mapping[str, float], limits: SchedulerConfig, probes: Sequence[Measured]
    ) -> None:
        self.work, self.prior, self.limits = work, {"chunk": CHUNK_S} | dict(prior), limits
        self.probes = [(one, one.chains(), one.groups()) for one in probes]
        self.rows = [row for one, _, groups in self.probes for row in compared(one, groups, one.ttft_s, one.tpot_s)]
        self.sigma = np.array([row.sigma for row in self.rows])
        self.measured = np.log([row.measured_s for row in self.rows])
        self.spread = np.array([spread for _, spread in GROUPS.values()])

    def coefficients(self, moved: Floats) -> dict[str, float]:
        """The prior's, with each group moved by that much in log."""
        factors = {
            name: float(np.exp(by)) for (names, _), by in zip(GROUPS.values(), moved, strict=True) for name in names
        }
        return {name: value * factors.get(name, 1.0) for name, value in self.prior.items()}

    def simulated(self, moved: Floats) -> Floats:
        """Log of every compared figure as the simulator has it."""
        steps = StepTime(self.work, self.coefficients(moved))
        figures = [row.measured_s for one, chains, groups in self.probes
                   for row in compared(one, groups, *play(one, chains, self.limits, steps))]  # fmt: skip
        return np.log(figures)

    def residuals(self, moved: Floats) -> Floats:
        """Errors in standard errors, and the distance from the prior in its own."""
        return np.concatenate([(self.simulated(moved) - self.measured) / self.sigma, moved / self.spread])

    def jacobian(self, moved: Floats) -> Floats:
        """Derivatives by differences wide enough to average over the simulator's steps."""
        here = self.residuals(moved)
        return np.stack([(self.residuals(moved + STEP * unit) - here) / STEP for unit in np.eye(len(moved))], axis=1)

    def solve(self) -> Floats:
        """Moves by group; first all figures pull, then those that nothing fits count less."""
        from scipy.optimize import least_squares

        moved = np.zeros(len(GROUPS))
        for scale, tries in ((30.0, 8), (2.0, 8)):
            found = least_squares(
                self.residuals, moved, self.jacobian, (-FARTHEST, FARTHEST), loss="soft_l1", f_scale=scale,
                max_nfev=tries, xtol=1e-3, ftol=1e-3,
            )  # fmt: skip
            moved = np.asarray(found.x)
        return moved

    def left_out(self, moved: Floats) -> Floats:
        """Log error of each figure had the fit not seen it, from the influence that it has on its own fit."""
        jacobian = self.jacobian(moved)
        influence = np.einsum("ij,ji->i", jacobian, np.linalg.pinv(jacobian))[: len(self.rows)]
        return np.asarray((self.simulated(moved) - self.measured) / np.maximum(1 - influence, 0.05))


def compared(probe: Measured, groups: list[str], ttft_s: Floats, tpot_s: Floats) -> list[Row]:
    """Medians (and quartiles where there are many) by group, of arrays that follow the probe's rows."""
    rows, kinds = list[Row](), np.array(groups)
    for group in sorted(set(groups)):
        for quantity, values in (("ttft_s", ttft_s), ("tpot_s", tpot_s)):
            seen = values[(kinds == group) & np.isfinite(probe.tpot_s if quantity == "tpot_s" else probe.ttft_s)]
            for percent in SIDES if len(seen) >= MANY else (50,):
                if len(seen):
                    figure = max(1e-6, float(np.nanpercentile(seen, percent)))
                    rows.append(Row(probe.name, group, quantity, percent, len(seen), figure))
    return rows


def play(probe: Measured, chains: list[list[int]], limits: SchedulerConfig, steps: StepTime) -> tuple[Floats, Floats]:
    """TTFT and TPOT of every request of the probe in the simulator, in s; NaN where it was refused there."""
    streams = probe.streams()
    delay_s = np.array([steps.request_s(int(tokens), streams) for tokens in probe.rows["prompt_tokens"]])
    cached = probe.told.get("prefix_hit_fraction") != 0 or probe.slots is not None
    limits = limits if cached else replace(limits, enable_prefix_caching=False)
    table = columns(Simulation(SimulationConfig(limits), steps).run(sessions(probe, chains, delay_s)))
    ttft_s, tpot_s = np.full((2, len(delay_s)), np.nan)
    place = {(key, turn): index for key, chain in enumerate(chains) for turn, index in enumerate(chain)}
    at = [place[key, turn] for key, turn in zip(table["key"], table["turn"], strict=True)]
    rest = table["output_len"] - 1
    ttft_s[at] = table["first_s"] - table["arrival_s"] + delay_s[at]
    tpot_s[at] = (table["end_s"] - table["first_s"]) / np.where(rest > 0, rest, np.nan)
    return ttft_s, tpot_s


def factor_90(errors: Floats) -> float:
    """x/÷ factor that holds 90 % of errors like these log errors: the conformal rank among them."""
    ranked = np.sort(np.abs(errors))
    rank = min(len(ranked), int(np.ceil((len(ranked) + 1) * COVERAGE)))
    return float(np.exp(ranked[rank - 1]))


def table(fit: Fit, before: Floats, after: Floats) -> list[dict[str, Any]]:
    """What each probe said, before and after, in s."""
    rows = zip(fit.rows, np.exp(before), np.exp(after), strict=True)
    return [
        {"probe": row.probe, "requests_like": row.group, "quantity": row.quantity, "percentile": row.percent}
        | {"requests": row.requests, "measured_s": row.measured_s, "before_s": float(old), "after_s": float(new)}
        for row, old, new in rows
    ]
