"""Figures of a load test and of a tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from kit.plots import BOX, headline, log2_ticks, log_ticks


def throughput_over_ttft(
    curve: Sequence[Mapping[str, Any]], predicted: Sequence[Mapping[str, Any]], limit_s: float, under: str
) -> Axes:
    """Output tokens per second over TTFT, a point per concurrency: p90 filled, p99 hollow; the prediction a line."""
    ax = plt.gca()
    parts = (("p90", curve, "C0", "o--", "C0"), ("p99", curve, "C2", "s:", "white"), ("p90", predicted, "C1", "--", ""))
    for part, rows, colour, style, face in parts:
        known = [row for row in rows if row[f"ttft_{part}_s"] is not None]
        x, y = ([row[name] for row in known] for name in (f"ttft_{part}_s", "output_tokens_per_s"))
        label = part if rows is curve else f"{part}, kit predict (modelled)"
        ax.plot(x, y, style, color=colour, label=label, markerfacecolor=face or None)
        for row in known if rows is curve and part == "p90" else ():
            at = row["ttft_p90_s"], row["output_tokens_per_s"]
            ax.annotate(row["concurrency"], at, xytext=(-6, 6), textcoords="offset points", ha="right", fontsize=9)
    ax.axvline(limit_s, color="#1f2429", linewidth=0.9, linestyle=":")
    ax.text(limit_s, 0.02, f" limit {limit_s:g} s", transform=ax.get_xaxis_transform(), va="bottom")
    ax.set(xscale="log", xlabel="TTFT (s)", ylabel="Output tokens per second", ylim=(0, None))
    log_ticks(ax.xaxis)
    ax.legend(loc="upper left", title="at n streams", alignment="left")
    within = [row for row in curve if row["ttft_p90_s"] is not None and row["ttft_p90_s"] <= limit_s]
    best = max(within, key=lambda row: float(row["output_tokens_per_s"]), default=None)
    told = "At {concurrency} streams {output_tokens_per_s:,.0f} tokens/s" if best else "No level"
    headline(ax, f"{told.format(**best or {})} with p90 TTFT within {limit_s:g} s", under)
    return ax


def goodput_by_limit(
    levels: Sequence[Mapping[str, Any]],
    limits: Mapping[str, int | None],
    chosen: int | None,
    slo_ttft_s: float,
    under: str,
) -> tuple[Axes, Axes]:
    """Goodput above, p95 TTFT below, over the turns that may run; limits and the choice as upright lines."""
    top, bottom = plt.gcf().subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.12})
    kinds = {"open": "arriving, with the burst", "closed": "always so many ready"}
    for (kind, label), style in zip(kinds.items(), ("o-", "s--"), strict=True):
        found = [one for one in levels if one["kind"] == kind]
        rows = {min(one["max_num_seqs"], one["concurrency"] or one["max_num_seqs"]): one for one in found}
        rows = dict(sorted(rows.items()))
        top.plot([*rows], [one["goodput_requests_per_s"] for one in rows.values()], style, label=label)
        known = {n: one["ttft_s"]["p95"] for n, one in rows.items() if one["ttft_s"]["p95"] is not None}
        bottom.plot([*known], [*known.values()], style)
    bottom.axhline(slo_ttft_s, color="#1f2429", linewidth=0.9, linestyle=":")
    bottom.text(1, slo_ttft_s, f"limit {slo_ttft_s:g} s", va="bottom", fontsize=9)
    for height, (name, at) in enumerate((name, at) for name, at in limits.items() if at):
        for ax in (top, bottom):
            ax.axvline(at, color="#667079", linewidth=0.9, linestyle=":")
        spot = {"xytext": (3, -12 - 12 * height), "textcoords": "offset points", "fontsize": 8, "bbox": BOX}
        top.annotate(f"{name} {at}", (at, 1), xycoords=top.get_xaxis_transform(), **spot)
    for ax in (top, bottom):
        ax.axvline(chosen or 1, color="#b4231f", linewidth=1.6)
    top.set(ylabel="Turns in time per second", ylim=(0, None))
    bottom.set(yscale="log", ylabel="TTFT p95 (s)", xlabel="Turns at once: --max-num-seqs")
    most = max(one["max_num_seqs"] for one in levels)
    log2_ticks(bottom, [2**power for power in range(int(np.log2(most)) + 1)])
    top.legend(loc="center left")
    headline(top, f"{chosen} at once serve most turns in time" if chosen else "No value serves turns in time", under)
    return top, bottom
