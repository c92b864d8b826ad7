"""Definitions by hand-sized examples, percentiles among misses, Wilson against its closed form."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.metrics import (
    Requests,
    burst_absorption,
    meets_slo,
    peak_in_flight,
    summarize,
    token_gaps,
    wilson_interval,
)


def requests(rows: list[tuple[float, ...]], ok: list[bool] | None = None) -> Requests:
    """Rows of scheduled, sent, first token, last token, end, output tokens."""
    columns = [np.array(column, float) for column in zip(*rows, strict=True)]
    return Requests(*columns, ok=np.array(ok or [True] * len(rows)))


def test_one_request_by_hand() -> None:
    one = requests([(1.0, 1.5, 2.0, 4.0, 4.1, 5)])
    assert one.ttft_s()[0] == 0.5
    assert one.ttft_scheduled_s()[0] == 1.0
    assert one.tpot_s()[0] == 0.5  # 2 s over the 4 tokens after the first
    assert one.e2el_s()[0] == 2.5


def test_tpot_of_one_token_is_undefined_and_meets_every_limit() -> None:
    one = requests([(0.0, 0.0, 1.0, 1.0, 1.0, 1)])
    assert np.isnan(one.tpot_s()[0])
    assert meets_slo(one, None, 0.001).all()


def test_tpot_leaves_out_all_tokens_of_the_first_chunk() -> None:
    one = requests([(0.0, 0.0, 1.0, 2.0, 2.0, 6)])
    one.first_chunk_tokens = np.array([2.0])
    assert one.tpot_s()[0] == 0.25


@given(st.lists(st.floats(0.001, 100), min_size=100, max_size=300))
def test_percentiles_without_misses_are_numpys(values: list[float]) -> None:
    got = summarize(values)
    for name, q in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert got[name] == pytest.approx(np.percentile(values, q), rel=1e-9)


@given(st.lists(st.floats(0.001, 100), min_size=90, max_size=120), st.integers(0, 60))
def test_a_miss_ranks_above_every_value(values: list[float], misses: int) -> None:
    got = summarize(values, misses)
    with np.errstate(invalid="ignore"):
        full = np.percentile([*values, *[1e300] * misses], 95)
    if got["p95"] is None:
        assert full > 100
        assert "misses" in got["nulls"]["p95"] or "needs" in got["nulls"]["p95"]
    else:
        assert got["p95"] == pytest.approx(full, rel=1e-9)


def test_no_p99_from_too_few_samples() -> None:
    assert summarize([1.0] * 99)["p99"] is None
    assert summarize([1.0] * 99)["nulls"] == {"p99": "needs 100 samples, has 99"}
    assert summarize([1.0] * 100)["p99"] == 1.0
    assert summarize([])["mean"] is None


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_edges_solve_its_equation(successes: int, trials: int) -> None:
    if successes > trials:
        return
    share = successes / trials
    for edge in wilson_interval(successes, trials) or ():
        spread = 1.959963984540054 * np.sqrt(edge * (1 - edge) / trials)
        assert abs(share - edge) == pytest.approx(spread, abs=1e-7)
    assert wilson_interval(0, 0) is None


def test_gaps_of_bundled_tokens() -> None:
    times = np.array([0.2, 0.5, 0.6])
    assert token_gaps(times, np.array([2, 3, 1])).tolist() == pytest.approx([0.1] * 4)
    assert token_gaps(times, None, 3).tolist() == pytest.approx([0.3, 0.1])
    assert token_gaps(times, None, 6).tolist() == pytest.approx([0.15, 0.05])


def test_attainment_counts_from_the_schedule_and_failures_miss() -> None:
    two = requests([(0.0, 0.4, 0.6, 1.0, 1.0, 2), (0.0, 0.0, 0.1, 0.2, 0.2, 2)], ok=[True, False])
    assert meets_slo(two, 0.5, None).tolist() == [False, False]
    assert meets_slo(two, 0.5, None, from_send=True).tolist() == [True, False]


def test_burst_absorption_by_hand() -> None:
    """Four at once served one per second; the SLO is 2 s; the fourth is refused at once."""
    rows = [(0.0, 0.0, float(k), k + 0.5, k + 0.5, 2) for k in (1, 2, 3)]
    four = requests([*rows, (0.0, 0.0, np.nan, np.nan, 0.1, 0)], ok=[True, True, True, False])
    refused = np.array([False, False, False, True])
    got = burst_absorption(four, 2.0, refused)
    assert got["backlog_request_s"] == pytest.approx(1 + 2 + 3 + 0.1)
    assert got["shed_fraction"] == 0.25
    assert got["largest_passing_burst"] == 2
    assert got["time_to_recover_s"] is None  # one was never served
    assert [row["p50"] for row in got["ttft_by_rank_s"]] == [1.0, 2.0, 3.0, None]
    served = requests(rows)
    assert burst_absorption(served, 2.0)["time_to_recover_s"] == 3.0
    assert burst_absorption(served, 5.0)["time_to_recover_s"] == 0.0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=40))
def test_peak_in_flight_is_the_sweep(spans: list[tuple[int, int]]) -> None:
    start = np.array([a for a, _ in spans], float)
    end = start + np.array([b for _, b in spans])
    counted = max(sum(a <= t < a + b for a, b in spans) for t in range(45))
    assert peak_in_flight(start, end) == counted


def test_import_needs_numpy_only() -> None:
    code = "import sys, json, kit.metrics; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert not {"pandas", "scipy", "typer", "asyncio", "pydantic"} & set(loaded)
