"""Figures: each draws numbers that are already there and returns its axes; the title is the finding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kit.catalog import GpuSpec, ModelSpec, gpu_keys
from kit.engine_config import EngineConfig
from kit.memory import MemoryPlan, plan
from kit.scenario import Held
from kit.units import gib
from kit.workload import Session

Floats = npt.NDArray[np.float64]

# A GPU has the same colour in every figure; those that scenarios compare come first.
_COMPARED = (
    "h100-sxm-80gb", "h200-sxm-141gb", "b200-sxm-180gb", "l40s-48gb", "h100-pcie-80gb",
    "rtx-5090-32gb", "rtx-4090-24gb", "a100-sxm-80gb", "rtx-pro-6000-96gb", "l4-24gb",
)  # fmt: skip
# One colour per part of the memory, in the order of the engine's sum.
PARTS = {
    "weights": "#3f90da", "activation": "#ffa90e", "outside PyTorch": "#832db6", "CUDA graphs": "#a96b59",
    "KV pool": "#8fc98b", "outside the share": "#e3e6ea",
}  # fmt: skip
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def gpu_colour(key: str) -> str:
    """The colour of a GPU in every figure, as matplotlib names it."""
    order = [*_COMPARED, *(other for other in gpu_keys() if other not in _COMPARED)]
    return f"C{order.index(key) % 10}"


def parts_gib(memory: MemoryPlan) -> dict[str, float]:
    """GiB of one GPU by part; they sum to the card where the model fits."""
    charged = [memory.weights, memory.activation, memory.non_torch]
    graphs = memory.cuda_graph.size_bytes if memory.graphs_charged else 0.0
    outside = memory.gpu.memory_bytes - memory.budget.size_bytes
    sizes = (*(term.size_bytes for term in charged), graphs, memory.kv_cache_bytes, outside)
    return dict(zip(PARTS, map(gib, sizes), strict=True))


def memory_by_gpu(held: Sequence[Held]) -> Axes:
    """Stacked bars: where one GPU's memory goes, with the sessions that the pool holds beside each."""
    ax = plt.gca()
    names = [short_name(one.memory.gpu) for one in held]
    parts = pd.DataFrame([parts_gib(one.memory) for one in held], index=names)
    parts.plot.barh(ax=ax, stacked=True, color=[*PARTS.values()], width=0.62)
    visible, rows = np.array([gib(one.memory.gpu.memory_bytes) for one in held]), np.arange(len(held))
    ax.vlines(visible, rows - 0.42, rows + 0.42, color="#1f2429", linewidth=1.6)
    ends = np.maximum(parts.sum(axis=1), visible)
    for row, (end, one) in enumerate(zip(ends, held, strict=True)):
        count = f"{one.answer.max_concurrent_sessions:,} sessions"
        text = count if one.memory.pool.size_bytes > 0 else "does not start"
        ax.text(end + 0.015 * max(ends), row, text, va="center", fontsize=9)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="Memory of one GPU (GiB); the black line is what CUDA reports", xlim=(0, 1.22 * max(ends)))
    pools = parts["KV pool"]
    finding = f"The same model leaves {min(pools):.0f} to {max(pools):.0f} GiB for KV cache"
    headline(ax, finding, subtitle(held[0].memory))
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.2), handlelength=1.2)
    return ax


def sessions_by_context(held: Sequence[Held], *, asked: tuple[int, int]) -> Axes:
    """Lines: sessions in each pool by context length; a cross marks the asked (tokens, sessions)."""
    ax = plt.gca()
    longest = min(131_072, held[0].memory.model.max_position_embeddings)
    contexts = [2**power for power in range(10, int(np.log2(longest)) + 1)]
    ends: list[tuple[float, str, str]] = []
    for one in (one for one in held if one.memory.num_blocks()):
        counts, low, high = (
            np.array([one.memory.concurrency(n, pool) for n in contexts])
            for pool in (None, *one.memory.kv_cache_bytes_interval)
        )
        colour, end = gpu_colour(one.memory.gpu.key), float(counts[-1])
        twin = any(abs(end / y - 1) < 0.03 for y, *_ in ends)  # drawn thin on the other
        ax.plot(contexts, counts, color=colour, linewidth=1.2 if twin else 3.0)
        ax.fill_between(contexts, low, high, color=colour, alpha=0.25, linewidth=0)
        number = f"{one.memory.config.gpu_count}x " if one.memory.config.gpu_count > 1 else ""
        ends.append((end, number + short_name(one.memory.gpu), colour))
    ax.axhline(1, color="#555b63", linewidth=0.8, linestyle=":")
    ax.plot(*asked, marker="X", markersize=10, color="#1f2429", linestyle="none")
    ax.text(asked[0] * 0.86, asked[1], f"asked: {asked[1]:,}", ha="right", va="center", bbox=BOX)
    log2_ticks(ax, contexts)
    ax.set(yscale="log", xlabel="Context of a session (tokens)", ylabel="Sessions in the KV pool")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else "none"))
    _label_ends(ax, contexts[-1], ends)
    fitting = [one for one in held if one.memory.concurrency(asked[0]) >= asked[1]]
    finding = f"{asked[1]:,} sessions of {asked[0]:,} tokens fit on {len(fitting)} of {len(held)} GPUs"
    headline(ax, finding, subtitle(held[0].memory))
    return ax


def pool_by_max_num_seqs(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, versions: Sequence[str]) -> Axes:
    """Lines: GiB of KV pool by --max-num-seqs, one per engine version; a tick marks its default."""
    ax = plt.gca()
    seqs = [2**power for power in range(4, 12)]
    ends: list[tuple[float, str, str]] = []
    lost: list[str] = []
    for index, version in enumerate(versions):
        base, colour = replace(config, engine_version=version, max_num_seqs=None), f"C{index}"
        pools = [gib(plan(spec, gpu, replace(base, max_num_seqs=count)).pool.size_bytes) for count in seqs]
        ax.plot(seqs, pools, color=colour)
        default = plan(spec, gpu, base)
        at = (default.config.max_num_seqs, gib(default.pool.size_bytes))
        ax.plot(*at, "|", color=colour, markersize=18, markeredgewidth=2)
        place, side = ((6, 8), "left") if index else ((-6, -16), "right")  # older versions lie below
        ax.annotate("default", at, xytext=place, textcoords="offset points", fontsize=9, ha=side)
        ends.append((pools[-1], f"{config.engine} {version}", colour))
        lost.append(f"{pools[0] - pools[-1]:.1f} GiB in {version}")
    log2_ticks(ax, seqs)
    _label_ends(ax, seqs[-1], ends)
    ax.set(xlabel="--max-num-seqs", ylabel="KV pool (GiB)")
    headline(ax, f"--max-num-seqs {seqs[-1]:,} costs {', '.join(lost)}", subtitle(default))
    return ax


def calls_per_minute(times_s: Mapping[str, Floats], under: str) -> Axes:
    """Steps: calls in each minute of several loads."""
    ax = plt.gca()
    edges = np.arange(0, max(map(np.max, times_s.values())) + 120, 60.0)
    counts = {name: np.histogram(times, edges)[0] for name, times in times_s.items()}
    for name, count in counts.items():
        ax.stairs(count, edges / 60, label=name, linewidth=1.8)
    ax.set(xlabel="Time (minutes)", ylabel="Calls per minute")
    ax.legend(loc="upper left")
    most = ", ".join(f"{max(count):,} ({name})" for name, count in counts.items())
    headline(ax, f"Calls in the busiest minute: {most}", under)
    return ax


def session_timeline(session: Session, turns: Any, under: str) -> Axes:
    """Context of one session over time: calls dark, pauses light and coloured by what they wait for."""
    ax = plt.gca()
    start, colours = turns["arrival_s"].min(), {"a call": "#1f2429"}
    span = turns["end_s"].max() - start
    for turn, row in zip(session.turns, turns.itertuples(), strict=False):
        begin, end, tokens = row.arrival_s - start, row.end_s - start, row.input_len + row.output_len
        ax.bar(begin, tokens, max(end - begin, span / 300), align="edge", color=colours["a call"])
        if turn.pause_kind:
            colour = colours.setdefault(f"waits for {turn.pause_kind}", f"C{len(colours) - 1}")
            ax.bar(end, tokens, turn.pause_after_s, align="edge", color=colour, alpha=0.45)
    ax.legend([Patch(color=one) for one in colours.values()], [*colours], loc="upper left")
    busy = (turns["end_s"] - turns["arrival_s"]).sum()
    ax.set(xlabel="Time in the session (s)", ylabel="Context (tokens)")
    headline(ax, f"{len(turns)} calls; in the model for {busy / span:.0%} of the session", under)
    return ax


def agents_timeline(calls: Any, under: str) -> Axes:
    """A row per session from its agent's start: calls as bars, what it waits for between them."""
    ax = plt.gca()
    starts = calls.groupby("agent")["start_s"].transform("min")
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(calls["framework"]))}
    names = list(dict.fromkeys(calls.sort_values(["agent", "start_s"])["session"]))
    for call, begin in zip(calls.itertuples(), calls["start_s"] - starts, strict=True):
        width = max(call.end_s - call.start_s, 0.004)
        ax.barh(names.index(call.session), width, left=begin, color=colours[call.framework], height=0.7)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="Time since the agent's first call (s)")
    busy, span = (
        (calls["end_s"] - calls["start_s"]).sum(),
        (calls["end_s"] - starts).groupby(calls["agent"]).max().sum(),
    )
    finding = f"{len(calls)} calls of {len(names)} sessions; {busy / span:.2g} calls in flight per agent"
    headline(ax, finding, under)
    return ax


def keeping(curves: Mapping[str, Mapping[str, tuple[float, float]]], under: str) -> Axes:
    """Hit fraction by idle over active KV, a point for each time that KV is kept; quoted ones without a line."""
    ax = plt.gca()
    for index, (name, points) in enumerate(curves.items()):
        hits, idle = zip(*points.values(), strict=True)
        marker, line = ("s", "none") if "quoted" in name else (".", "-")
        ax.plot(idle, hits, color=f"C{index}", label=name, marker=marker, linestyle=line)
        for keep, at in zip(points, zip(idle, hits, strict=True), strict=True):
            ax.annotate(keep, at, xytext=(4, -11), textcoords="offset points", fontsize=8, color=f"C{index}")
    ax.set(xscale="log", xlabel="Idle KV per active KV (token-seconds)", ylabel="Prompt tokens found cached")
    ax.set(ylim=(0, 1.05))
    ax.legend(loc="lower right")
    headline(ax, "Keeping KV longer finds more of it, and holds more of it idle", under)
    return ax


def lines_over(curves: Mapping[str, tuple[Any, Any]], finding: str, under: str, **axes: Any) -> Axes:
    """Lines of (x, y) from zero, with their names at the right ends."""
    ax = plt.gca()
    ax.set(**axes)
    for index, (x, y) in enumerate(curves.values()):
        ax.plot(x, y, color=f"C{index}")
    ax.set_ylim(bottom=0)
    last = max(x[-1] for x, _ in curves.values())
    _label_ends(ax, last, [(y[-1], name, f"C{i}") for i, (name, (_, y)) in enumerate(curves.items())])
    headline(ax, finding, under)
    return ax


def spans(
    rows: Sequence[Mapping[str, Any]], finding: str, under: str, *, limit: tuple[float, str] | None = None, **axes: Any
) -> Axes:
    """Bars from `start` to `end` by `label`, a colour per `group`, with whiskers over the `interval` and a `text`."""
    ax = plt.gca()
    labels, groups = (list(dict.fromkeys(row[name] for row in rows)) for name in ("label", "group"))
    height = 0.8 / len(groups)
    for row in rows:
        group = groups.index(row["group"])
        y = labels.index(row["label"]) + (group - (len(groups) - 1) / 2) * height
        ax.barh(y, row["end"] - row["start"], 0.9 * height, left=row["start"], color=f"C{group}")
        ax.plot(row["interval"], [y, y], color="#1f2429", linewidth=1.2, marker="|", markersize=6)
        at = max(row["end"], *row["interval"]), y
        ax.annotate(row["text"], at, xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    if limit:
        ax.axvline(limit[0], color="#1f2429", linewidth=0.9, linestyle=":")
        ax.text(limit[0], 1, f"{limit[1]} ", transform=ax.get_xaxis_transform(), ha="right", va="top", fontsize=9)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set(**{"xlim": (0, None), **axes})
    ax.grid(axis="y", visible=False)
    if len(groups) > 1:
        colours = [Patch(color=f"C{index}") for index in range(len(groups))]
        below = -0.8 / plt.gcf().get_figheight()
        ax.legend(colours, groups, loc="upper center", bbox_to_anchor=(0.45, below), ncols=len(groups))
    headline(ax, finding, under)
    return ax


def short_name(gpu: GpuSpec) -> str:
    """The GPU's name without its maker."""
    return gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("AMD ")


def subtitle(memory: MemoryPlan) -> str:
    """What a figure was computed for."""
    config = memory.config
    return f"{memory.model.key} · {config.quantization} · {config.engine} {config.engine_version} · modelled"


def headline(ax: Axes, finding: str, subtitle: str) -> None:
    ax.set_title(finding, pad=22)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=9, color="#667079", va="bottom")


def log_ticks(axis: Axis, form: str = "g") -> None:
    """Ticks at 1, 2 and 5 of each power of ten of a log axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axis.set_minor_locator(NullLocator())


def log2_ticks(ax: Axes, ticks: Sequence[int]) -> None:
    """A log2 x axis with its ticks written out, 1,024 as 1K."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    ax.minorticks_off()


def _label_ends(ax: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each line's (y, name, colour) written at its right end, moved apart where they would overlap."""
    ax.margins(x=0.02)
    above = -np.inf
    for y, name, colour in sorted(ends):
        height = ax.transData.transform((x, y))[1]
        above = max(height, above + 17)
        offset = (6, (above - height) * 72 / ax.figure.dpi)
        label = ax.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=9)
        label.set(color=colour, va="center", annotation_clip=False)
