"""Published runs against predictions, and what a replica takes: bounds that must hold whatever the coefficients."""

import pytest

from kit import accuracy, budget, catalog, scenario
from kit.catalog.paths import DATA, load_yaml


def test_every_published_run_is_answered() -> None:
    rows, runs = list(accuracy.published()), load_yaml(DATA / "published_runs.yaml")
    refused = [row for row in rows if "refused" in row]
    assert len(rows) == 2 * (len(runs) - len(refused)) + len(refused)
    for row in rows:
        assert row["source"]
        assert row["date"]
        if "refused" not in row:
            assert row["inside"] == (row["interval_s"][0] <= row["published_s"] <= row["interval_s"][1])
            assert row["ratio"] == pytest.approx(row["predicted_s"] / row["published_s"])


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm"])
def test_less_data_means_no_narrower_an_interval(engine: str) -> None:
    rows = {row["data near it"]: row for row in accuracy.left_out(engine)}
    assert rows["measured"]["TPOT 90 % x/÷"] <= rows["transfer"]["TPOT 90 % x/÷"] <= rows["new"]["TPOT 90 % x/÷"]


def test_capacity_lies_within_its_interval_and_follows_the_limits() -> None:
    case = scenario.load("voice-agent")
    spec, card = catalog.model(case.model), catalog.gpu("l40s-48gb")
    one = budget.machine(spec, card, case.config(spec))
    low, middle, high = accuracy.capacity(one, case, case.slo)
    assert 0 < low <= middle <= high <= budget.MOST_STREAMS
    assert accuracy.capacity(one, case, {"ttft_s": 0.1, "tpot_s": 0.05})[1] < middle
    assert accuracy.capacity(one, case, {"ttft_s": 1e-4}) == (0, 0, 0)
    assert accuracy.capacity(one, case, {})[0] == budget.MOST_STREAMS


def test_a_hidden_machine_plays_and_is_slower_where_it_must_be() -> None:
    case = scenario.load("customer-service")
    spec, card = catalog.model(case.model), catalog.gpu("h100-sxm-80gb")
    one = budget.machine(spec, card, case.config(spec))
    other = accuracy.hidden(one, 7)
    load = budget.streams(case, 4)
    ours, theirs = (accuracy.outcome(each, load) for each in (one, other))
    assert other.steps.truth.bandwidth_factor < 0.75
    assert theirs["TPOT mean"] > 1.25 * ours["TPOT mean"]


def test_replicas_round_up_and_may_be_impossible() -> None:
    assert accuracy.replicas(10_000, 144) == 70
    assert accuracy.replicas(10_000, 0) is None
