"""Figures, by what they plot and say; pixels are looked at by people."""

import itertools

import matplotlib as mpl
import pandas as pd
import pytest

from kit import catalog, plots, plots_load, scenario
from kit.catalog.paths import DATA
from kit.engine_config import EngineConfig
from kit.memory import plan
from kit.units import gib
from kit.workload import Session, Turn

mpl.use("Agg")
from matplotlib import pyplot as plt

CASE = scenario.load("customer-service")
SPEC = catalog.model(CASE.model)


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def held(*keys: str) -> list[scenario.Held]:
    config = CASE.config(SPEC)
    return [scenario.hold(SPEC, catalog.gpu(key), config, CASE.demand()) for key in keys]


def said(ax) -> list[str]:
    return [text.get_text() for text in ax.texts] + [ax.get_title("left") or ax.get_title()]


def test_parts_sum_to_the_card():
    memory = plan(SPEC, catalog.gpu("h100-sxm-80gb"), EngineConfig())
    assert sum(plots.parts_gib(memory).values()) == pytest.approx(gib(memory.gpu.memory_bytes), abs=1e-6)


def test_memory_by_gpu(ax):
    found = held("rtx-4090-24gb", "h200-sxm-141gb")
    plots.memory_by_gpu(found)
    assert "GiB" in ax.get_xlabel()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == [plots.short_name(one.memory.gpu) for one in found]
    assert rows[1] == "H200 SXM 141 GB"
    bars = [container.get_label() for container in ax.containers]
    assert bars == list(plots.PARTS)
    pools = [bar.get_width() for bar in ax.containers[bars.index("KV pool")]]
    assert pools == [0.0, pytest.approx(gib(found[1].memory.pool.size_bytes))]
    assert "does not start" in said(ax)
    assert f"{found[1].answer.max_concurrent_sessions:,} sessions" in said(ax)
    assert "0 to" in said(ax)[-1]


def test_sessions_by_context(ax):
    found = held("rtx-4090-24gb", "l40s-48gb", "h100-sxm-80gb", "h200-sxm-141gb")
    plots.sessions_by_context(found, asked=(CASE.context_tokens, CASE.sessions))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "Context of a session (tokens)"
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 3  # the card that does not start has none
    for curve, one in zip(curves, found[1:], strict=True):
        contexts = list(curve.get_xdata())
        assert contexts[0] == 1024
        assert curve.get_ydata()[3] == one.memory.concurrency(contexts[3])
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (8192, 50)
    assert "50 sessions of 8,192 tokens fit on 1 of 4 GPUs" in said(ax)
    assert {plots.short_name(one.memory.gpu) for one in found[1:]} <= set(said(ax))


def test_labels_at_the_ends_do_not_overlap(ax):
    plots.sessions_by_context(held("h100-pcie-80gb", "h100-sxm-80gb", "h200-sxm-141gb"), asked=(8192, 50))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts if "GB" in text.get_text()]
    assert len(boxes) == 3
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_pool_by_max_num_seqs(ax):
    gpu, config = catalog.gpu("h100-sxm-80gb"), CASE.config(SPEC)
    plots.pool_by_max_num_seqs(SPEC, gpu, config, ("0.16.0", "0.32.0"))
    curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(curves) == 2
    assert all(list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True) for line in curves)
    for line, version in zip(
        [line for line in ax.lines if line.get_marker() == "|"], ("0.16.0", "0.32.0"), strict=True
    ):
        default = plan(SPEC, gpu, EngineConfig(engine_version=version, max_model_len=8192))
        assert line.get_xdata()[0] == default.config.max_num_seqs
        assert line.get_ydata()[0] == pytest.approx(gib(default.pool.size_bytes))
    assert ax.get_ylabel() == "KV pool (GiB)"
    assert "vllm 0.32.0" in said(ax)


@pytest.mark.parametrize("path", sorted((DATA / "scenarios").glob("*.yaml")), ids=lambda path: path.stem)
def test_compared_gpus_have_colours_of_their_own(path):
    keys = scenario.load(path).gpus
    assert len({plots.gpu_colour(key) for key in keys}) == len(keys)


def test_calls_per_minute(ax):
    plots.calls_per_minute({"burst": [5.0, 6.0, 7.0], "slow": [1.0, 70.0]}, "here")
    assert "3 (burst), 1 (slow)" in said(ax)[-1]
    assert ax.get_ylabel() == "Calls per minute"


def test_session_timeline(ax):
    session = Session(0, 0.0, [Turn(100, 10, 90.0, "shell"), Turn(5, 10)])
    columns = {"arrival_s": [10.0, 105.0], "end_s": [15.0, 110.0], "input_len": [100, 115], "output_len": [10, 10]}
    plots.session_timeline(session, pd.DataFrame(columns), "here")
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches] == [
        (0, 5, 110), (5, 90, 110), (95, 5, 125),
    ]  # fmt: skip
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a call", "waits for shell"]
    assert said(ax)[-1] == "2 calls; in the model for 10% of the session"


def test_keeping_draws_quoted_points_without_a_line(ax):
    points = {"10 s": (0.4, 1.0), "1 h": (0.9, 9.0)}
    plots.keeping({"ours": points, "theirs (quoted)": points}, "here")
    ours, theirs = ax.lines
    assert list(ours.get_xdata()) == [1.0, 9.0]
    assert list(ours.get_ydata()) == [0.4, 0.9]
    assert (ours.get_linestyle(), theirs.get_linestyle(), theirs.get_marker()) == ("-", "None", "s")


def test_lines_over_names_each_line(ax):
    plots.lines_over({"a": ([0, 1], [5, 1]), "b": ([0, 1], [2, 4])}, "finding", "here", ylabel="Sessions")
    assert {"a", "b", "here", "finding"} <= set(said(ax))
    assert ax.get_ylim()[0] == 0


def test_throughput_over_ttft(ax):
    curve = [
        {"concurrency": n, "output_tokens_per_s": rate, "ttft_p90_s": p90, "ttft_p99_s": p99}
        for n, rate, p90, p99 in ((1, 100.0, 0.02, None), (16, 900.0, 0.3, None), (64, 1500.0, 0.9, 1.2))
    ]
    plots_load.throughput_over_ttft(curve, [{"ttft_p90_s": 0.03, "output_tokens_per_s": 90.0}], 0.5, "below")
    p90, p99, predicted, limit = ax.lines
    assert list(p90.get_xdata()) == [0.02, 0.3, 0.9]
    assert list(p99.get_xdata()) == [1.2]  # unknown ones are left out
    assert (list(predicted.get_xdata()), predicted.get_marker()) == ([0.03], "None")
    assert limit.get_xdata()[0] == 0.5
    assert {"1", "16", "64", "below", "At 16 streams 900 tokens/s with p90 TTFT within 0.5 s"} <= set(said(ax))
    assert "(s)" in ax.get_xlabel()


def test_no_level_within_the_limit(ax):
    plots_load.throughput_over_ttft(
        [{"concurrency": 1, "output_tokens_per_s": 9.0, "ttft_p90_s": None, "ttft_p99_s": None}], [], 0.5, "below"
    )
    assert "No level with p90 TTFT within 0.5 s" in said(ax)


def test_spans_have_a_bar_and_a_whisker_each(ax):
    rows = [
        {"label": label, "group": group, "start": 0, "end": end, "interval": [end / 2, 2 * end], "text": f"{end} ms"}
        for label, group, end in (("queue", "alone", 1), ("queue", "loaded", 8), ("prefill", "loaded", 3))
    ]
    plots.spans(rows, "finding", "under", limit=(5, "limit"))
    assert [bar.get_width() for bar in ax.patches] == [1, 8, 3]
    assert [line.get_xdata()[1] for line in ax.lines[:3]] == [2, 16, 6]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["queue", "prefill"]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"alone", "loaded"}


def test_goodput_by_limit():
    def level(kind: str, most: int, concurrency: int | None, rate: float, p95: float | None) -> dict:
        told = {"kind": kind, "max_num_seqs": most, "concurrency": concurrency, "goodput_requests_per_s": rate}
        return told | {"ttft_s": {"p95": p95}}

    levels = [level("closed", 64, 1, 1.0, None), level("closed", 64, 32, 9.0, 0.4), level("open", 64, 16, 5.0, 0.9)]
    levels += [level("open", 64, None, 8.0, 0.3), level("open", 32, None, 8.5, 0.2)]
    top, bottom = plots_load.goodput_by_limit(levels, {"tpot": 40, "kv_cache": None}, 32, 0.5, "below")
    opened, closed, tpot, chosen = top.lines
    assert [*opened.get_xdata(), *opened.get_ydata()] == [16, 32, 64, 5.0, 8.5, 8.0]  # by what the engine may run
    assert list(closed.get_xdata()) == [1, 32]
    assert (tpot.get_xdata()[0], chosen.get_xdata()[0]) == (40, 32)
    assert list(bottom.lines[1].get_xdata()) == [32]  # an unknown p95 is left out
    assert {"tpot 40", "32 at once serve most turns in time", "below"} <= set(said(top))
    assert "limit 0.5 s" in said(bottom)
