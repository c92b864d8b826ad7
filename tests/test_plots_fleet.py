"""Figures of fleets, by what they plot and say."""

from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from kit import plots_fleet

mpl.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def row(usd, met, usd_interval, met_interval):
    row = {"usd_per_month": usd, "slo_attainment_fraction": met, "usd_per_month_interval": usd_interval}
    return row | {"slo_attainment_interval": met_interval}


def test_pareto_rings_the_chosen_policy_and_draws_both_intervals(ax):
    rows = {
        "on-demand": row(1400.0, 1.0, (1400.0, 2800.0), (0.9, 1.0)),
        "spot": row(900.0, 0.8, (900.0, 1800.0), (0.6, 0.9)),
        "per-token-api": row(60.0, None, (60.0, 60.0), None),
    }
    plots_fleet.pareto(rows, "on-demand", 0.95, "under")
    title = ax.get_title("left") or ax.get_title()
    assert title == "on-demand: 1,400 USD a month, at least 95% of the turns within the SLO"
    (ring,) = [line for line in ax.lines if line.get_markersize() == 16]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1400.0, 1.0)
    bars = [one.get_segments()[0] for box in ax.containers for one in box[2]]
    assert any(np.allclose(bar, [(1400, 1), (2800, 1)]) for bar in bars)
    assert any(np.allclose(bar, [(900, 0.6), (900, 0.9)]) for bar in bars)
    assert "per-token-api (attainment unknown)" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_day_shows_load_losses_and_waits():
    kept = SimpleNamespace(reclaimed=False, end_s=np.inf)
    gone = SimpleNamespace(reclaimed=True, end_s=7200.0)
    fleet = SimpleNamespace(horizon_s=86_400.0, live=[kept], ended=[gone])
    day = SimpleNamespace(fleet=fleet, timeline=[(0.0, 0, 2, 0), (7200.0, 1, 1, 1)], lost=3)
    turns = pd.DataFrame({"arrival_s": [10.0, 20.0, 7210.0], "first_s": [10.1, 20.3, 7310.0], "good": [1, 1, 0]})
    load, machines, ttft = plots_fleet.fleet_day(day, turns, 0.5, "under")
    try:
        assert load.patches[0].get_data().values.sum() == 3
        (mark,) = [line for line in machines.lines if line.get_marker() == "X"]
        assert list(mark.get_xdata()) == [2.0]
        median = ttft.lines[0].get_ydata()
        assert list(median) == [pytest.approx(0.2), pytest.approx(100.0)]
        assert "66.7% within the SLO, 3 lost" in (load.get_title("left") or load.get_title())
    finally:
        plt.close(load.figure)
