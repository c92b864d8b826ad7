"""The latency budget: stages that add up, limits before price, intervals that lie around the point."""

from random import Random

import pandas as pd
import pytest

from kit import budget, catalog, prices, scenario
from kit.errors import UserError

CASE = scenario.load("customer-service")
SPEC = catalog.model(CASE.model)


def machine(gpu: str = "h100-sxm-80gb", **flags) -> budget.Machine:
    return budget.machine(SPEC, catalog.gpu(gpu), CASE.config(SPEC, **flags))


def test_a_conversation_grows_as_the_scenario_says() -> None:
    sizes = [turn for turn, _ in zip(budget.conversation(CASE, Random(0)), range(2 * CASE.turns), strict=False)]
    assert [index for index, turn in enumerate(sizes) if turn.compact_to == 0] == [0, CASE.turns]
    assert 1600 <= sizes[0].new_tokens <= 2400
    assert all(160 <= turn.new_tokens <= 240 for turn in sizes[1:10])
    later = next(budget.conversation(CASE, Random(0), begin=4))
    assert later.new_tokens == pytest.approx(2000 + 4 * 400, rel=0.2)


def test_stages_add_up_and_the_queue_grows_with_the_streams() -> None:
    one = machine(max_num_seqs=16)
    few, many = (budget.turns(one, one.play(budget.streams(CASE, count))) for count in (4, 32))
    for table in (few, many):
        parts = table["api_s"] + table["queue_s"] + table["prefill_s"]
        assert parts.tolist() == pytest.approx(table["ttft_s"].tolist())
        assert table["queue_s"].min() >= -1e-9
        assert len(table) > 300
    assert many["queue_s"].mean() > 10 * few["queue_s"].mean()


def test_attainment_counts_every_limit_and_moves_with_the_interval() -> None:
    table = pd.DataFrame({"ttft_s": [0.1, 0.3, 0.6], "decode_s": [1.0, 1.0, 1.0], "tpot_s": [0.01, 0.06, 0.01]})
    assert budget.attainment(table, {"ttft_s": 0.5, "tpot_s": None, "e2el_s": None}) == pytest.approx(2 / 3)
    assert budget.attainment(table, {"ttft_s": 0.5, "tpot_s": 0.05}) == pytest.approx(1 / 3)
    assert budget.attainment(table, {"ttft_s": 0.5}, slower=(2.0, 1.0)) == pytest.approx(1 / 3)
    assert budget.attainment(table, {"e2el_s": 1.2}, slower=(1.0, 2.0)) == 0
    assert budget.attainment(table, {}) == 1


def test_limits_come_before_price() -> None:
    best = {"meets": True, "usd_per_hour": 4.0, "slo_attainment_fraction": 0.97}
    rows = [best, {**best, "usd_per_hour": 2.0}, {**best, "usd_per_hour": None}]
    rows += [{"meets": False, "usd_per_hour": 0.5, "slo_attainment_fraction": share} for share in (0.1, 0.9)]
    found = budget.ranked(rows)
    assert [row["usd_per_hour"] for row in found] == [2.0, 4.0, None, 0.5, 0.5]
    assert [row["slo_attainment_fraction"] for row in found[3:]] == [0.9, 0.1]


def test_a_candidate_has_as_many_gpus_as_the_limits_need() -> None:
    config, tight = CASE.config(SPEC), {"ttft_s": 0.5, "tpot_s": 0.025}
    loose = budget.candidate(CASE, SPEC, catalog.gpu("h100-pcie-80gb"), config, CASE.slo)
    close = budget.candidate(CASE, SPEC, catalog.gpu("h100-pcie-80gb"), config, tight)
    assert loose is not None
    assert close is not None
    assert loose["gpus"] < close["gpus"]
    low, high = close["slo_attainment_interval"]
    assert low <= close["slo_attainment_fraction"] <= high
    shown = budget.priced(loose, [prices.GpuPrice(gpu="h100-pcie-80gb", on_demand=2.0)])
    assert shown["usd_per_hour"] == 2.0 * loose["gpus"]
    assert shown["usd_per_million_output_tokens"] == pytest.approx(2.0 / (loose["output_tokens_per_s"] * 0.0036))


def test_limits_that_one_session_alone_misses_are_not_chased() -> None:
    found = budget.candidate(CASE, SPEC, catalog.gpu("h100-pcie-80gb"), CASE.config(SPEC), {"ttft_s": 1e-4})
    assert found is not None
    assert (found["meets"], found["gpus"]) == (False, 1)


def test_many_sessions_are_dealt_over_replicas() -> None:
    many = scenario.load("burst-10000")
    spec = catalog.model(many.model)
    found = budget.candidate(many, spec, catalog.gpu("b200-sxm-180gb"), many.config(spec), many.slo)
    assert found is not None
    assert found["meets"]
    assert found["replicas"] * found["streams"] >= many.sessions


def test_a_conversation_ends_before_its_longest_context() -> None:
    case = scenario.load("complex-reasoning")
    sizes = [turn for turn, _ in zip(budget.conversation(case, Random(1)), range(200), strict=False)]
    held = 0
    for turn in sizes:
        held = (0 if turn.compact_to == 0 else held) + turn.new_tokens + turn.output_len
        assert held <= case.context_tokens


def test_a_lost_cache_moves_a_task_towards_first_tokens() -> None:
    kept, lost = (budget.task(machine(), replace_turns(40), keep_kv=keep) for keep in (True, False))
    assert kept["calls"] == lost["calls"] == 40
    assert lost["ttft_s"] > 2 * kept["ttft_s"]
    assert lost["decode_s"] == pytest.approx(kept["decode_s"], rel=0.01)


def replace_turns(turns: int) -> scenario.Scenario:
    return CASE.model_copy(update={"turns": turns, "tokens_added_per_turn": 50, "output_tokens_per_turn": 80})


def test_presets_name_what_they_have() -> None:
    assert budget.preset("voice")["ttft_s"] == 0.2
    with pytest.raises(UserError, match="unknown SLO preset 'voise'"):
        budget.preset("voise")


def test_a_card_without_room_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="leaves no room for a KV cache on 1 x t4-16gb"):
        machine("t4-16gb")
