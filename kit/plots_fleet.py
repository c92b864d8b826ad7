"""Figures of fleets: cost against attainment, and one day of a policy; each returns its axes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from kit import plots
from kit.fleet.day import FleetDay

MARKERS = "osD^vP*X"
SLOT_S = 1800.0  # over which a day's TTFT is summed up


def pareto(policies: Mapping[str, Mapping[str, Any]], chosen: str | None, least: float, under: str) -> Axes:
    """Attainment over USD a month, a point for each policy with its 90 % bars; the chosen one is ringed."""
    ax = plt.gca()
    for index, (name, row) in enumerate(policies.items()):
        usd, met, colour = row["usd_per_month"], row["slo_attainment_fraction"], f"C{index}"
        if met is None:
            ax.axvline(usd, color=colour, linestyle="--", label=f"{name} (attainment unknown)")
            continue
        bars = [np.abs(np.array([row[key]]).T - value) for key, value in (
            ("usd_per_month_interval", usd), ("slo_attainment_interval", met)
        )]  # fmt: skip
        ax.errorbar(usd, met, xerr=bars[0], yerr=bars[1], color=colour, elinewidth=0.8, fmt=MARKERS[index], label=name)
        if name == chosen:
            ax.plot(usd, met, "o", markersize=16, markerfacecolor="none", markeredgecolor="#1f2429")
    ax.axhline(least, color="#1f2429", linewidth=0.9, linestyle=":")
    ax.text(1, least, f"{least:.0%} ", transform=ax.get_yaxis_transform(), ha="right", va="bottom")
    ax.set(xscale="log", xlabel="USD per month", ylabel="Turns within the SLO", ylim=(None, 1.03))
    plots.log_ticks(ax.xaxis, ",.0f")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.17))
    told = f"{chosen}: {policies[chosen]['usd_per_month']:,.0f} USD a month" if chosen else "None of these policies"
    plots.headline(ax, f"{told}, at least {least:.0%} of the turns within the SLO", under)
    return ax


def fleet_day(day: FleetDay, turns: Any, limit_s: float | None, under: str) -> list[Axes]:
    """A day from above: turns a minute, replicas with spot losses, TTFT; `turns` are the completed ones."""
    _, (load, machines, ttft) = plt.subplots(3, 1, sharex=True, figsize=(6.5, 6.5), height_ratios=(2, 1, 2))
    edges = np.arange(0, day.fleet.horizon_s + 60, 60.0)
    load.stairs(np.histogram(turns.arrival_s, edges)[0], edges / 3600, fill=True)
    load.set(ylabel="Turns per minute")
    at_s, _, serving, starting = np.array(day.timeline).T
    machines.step(at_s / 3600, serving, where="post", label="serving")
    machines.step(at_s / 3600, serving + starting, where="post", linestyle=":", label="and starting or draining")
    lost = [one.end_s / 3600 for one in day.fleet.live + day.fleet.ended if one.reclaimed and one.end_s < edges[-1]]
    machines.plot(lost, np.zeros(len(lost)), "X", color="C2", clip_on=False, label="spot machine taken back")
    machines.set(ylabel="Replicas", ylim=(0, None))
    machines.legend(loc="upper left", bbox_to_anchor=(0, 1.35), ncols=3)
    waits = (turns.first_s - turns.arrival_s).groupby(turns.arrival_s // SLOT_S)
    for index, share in enumerate((0.5, 0.95)):
        found = waits.quantile(share)
        ttft.plot((np.array(found.index) + 0.5) * SLOT_S / 3600, found, f"C{index}.-", label=f"p{share * 100:.0f}")
    if limit_s:
        ttft.axhline(limit_s, color="#1f2429", linewidth=0.9, linestyle=":", label="limit")
    ttft.set(yscale="log", ylabel="TTFT (s), half-hours", xlabel="Hour of the day", xlim=(0, edges[-1] / 3600))
    plots.log_ticks(ttft.yaxis)
    ttft.legend(loc="upper left", ncols=3)
    plots.headline(load, f"{len(turns):,} turns; {turns.good.mean():.1%} within the SLO, {day.lost} lost", under)
    return [load, machines, ttft]
