"""The article's lines: our numbers against arithmetic written out here, and verdicts that follow from them."""

import re

import pytest

from kit import article, catalog, scenario
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.memory import plan

RECORDS = load_yaml(DATA / "article.yaml")["lines"]
HOLDS, CONDITION, NOT = article.VERDICTS
EXPECTED = {
    "A1": [NOT],
    "A2": [CONDITION],
    "A3": [CONDITION],
    "A4": [HOLDS, HOLDS, HOLDS],
    "A5": [CONDITION],
    "A6": [HOLDS],
    "A7": [CONDITION],
    "B1": [CONDITION, HOLDS],
    "B2": [HOLDS, HOLDS, CONDITION, NOT],
    "B3": [NOT],
    "B4": [CONDITION, HOLDS, NOT],
    "C1": [CONDITION],
    "C2": [HOLDS, HOLDS, HOLDS],
    "C3": [HOLDS, HOLDS, HOLDS],
    "C4": [CONDITION, HOLDS],
    "C5": [HOLDS, HOLDS],
    "C6": [HOLDS, HOLDS, CONDITION],
    "C7": [HOLDS, CONDITION],
    "C8": [HOLDS, HOLDS],
    "D2": [HOLDS, CONDITION],
    "D3": [HOLDS, HOLDS],
    "D4": [CONDITION],
    "E4": [HOLDS, CONDITION],
    "E5": [CONDITION, HOLDS, CONDITION, HOLDS],
    "F1": [CONDITION],
    "F2": [CONDITION],
    "F3": [HOLDS],
}
ASKED = {
    "00": ["A1", "A2", "A3", "A5", "A6", "A7", "B1", "B2", "B3", "B4"],
    "01": ["A1", "A2", "A3", "A5", "A6", "A7", "B3"],
    "02": ["A4", "A6", "B1", "B2", "B4", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"],
    "03": ["D2", "D3", "D4", "E4", "E5"],
    "07": ["E4"],
    "08": ["B3", "F1", "F2", "F3"],
}
GB = 1e9
KV_7B = 2 * 32 * 8 * 128 * 2  # Mistral 7B: key and value, 32 layers, 8 KV heads of 128, 2 bytes
KV_NEMO = 2 * 40 * 8 * 128 * 2
KV_70B = 2 * 80 * 8 * 128 * 2
KV_LLAMA_2_13B = 2 * 40 * 40 * 128 * 2


def lines(key: str) -> list[article.Line]:
    return [article.line(record) for record in RECORDS if record["id"] == key]


@pytest.mark.parametrize("key", EXPECTED)
def test_verdicts(key):
    assert [one.verdict for one in lines(key)] == EXPECTED[key]


@pytest.mark.parametrize("notebook", ASKED)
def test_each_notebook_answers_its_lines(notebook):
    found = article.lines(notebook)
    assert sorted({one.id for one in found}) == ASKED[notebook]
    for one in found:
        assert not re.search(r"[{}]", one.reason)
        assert one.claim
        assert one.figure


def test_a_verdict_follows_from_the_numbers():
    record = next(record for record in RECORDS if record["id"] == "B1")
    ours = article.line(record).ours
    fp8 = article.line(record).on_condition
    assert ours < 36 < fp8
    for rule, verdict in (
        ({"at_least": ours}, HOLDS),
        ({"at_least": fp8}, CONDITION),
        ({"at_least": fp8 + 1}, NOT),
        ({"about": ours * 1.05, "within": 0.1}, HOLDS),
        ({"about": ours * 1.5, "within": 0.1}, NOT),
    ):
        assert article.line({**record, "rule": rule}).verdict == verdict


def test_bursts_and_pauses():
    (burst,) = lines("A1")
    active = catalog.model("llama-3.1-8b").active_parameters
    assert burst.ours == pytest.approx(10_000 * 500 * 2 * active / 989e12)
    assert 60 < burst.ours < 100  # more than a minute at a rate that no engine reaches
    (job,) = lines("A2")
    assert (job.ours, job.on_condition) == (2000, 500)
    (ranking,) = lines("A3")
    assert ranking.ours / ranking.on_condition == pytest.approx(7)  # six more prompts in front
    (paused,) = lines("A5")
    held = int(plan_of("llama-3.1-8b", "h100-pcie-80gb", quantization="fp8", max_model_len=4096).concurrency(4096))
    assert paused.ours == held - 50


def plan_of(model: str, gpu: str, **flags):
    return plan(catalog.model(model), catalog.gpu(gpu), EngineConfig(**flags))


def test_loading_13b():
    slow, quick, local = lines("A4")
    size = 2 * catalog.model("codellama-13b").parameters
    assert slow.ours == pytest.approx(size / 125e6)
    assert quick.ours == pytest.approx(size / 500e6)
    assert 26 * GB / 125e6 == 208  # the article's own 26 GB
    assert 26 * GB / 500e6 == 52
    assert local.ours < 30


def test_growth():
    (turns,) = lines("A6")
    assert turns.ours == pytest.approx((8000 + 800 + 9 * (1500 + 800)) / (8000 + 800))
    (reserved,) = lines("A7")
    assert reserved.ours == 1
    assert reserved.on_condition == pytest.approx((2200 + 9 * 400) / 2200)


def test_the_article_counts_36_sessions_without_a_runtime():
    rtx, pcie = lines("B1")
    assert (32 - 14) / 0.5 == 36
    memory = plan_of("mistral-7b-v0.3", "rtx-5090-32gb", max_model_len=4096)
    assert rtx.ours == int(memory.kv_cache_bytes // (KV_7B * 4096))
    assert pcie.ours > 100


def test_three_models_on_one_card():
    weights, l40s, pcie, swap = lines("B2")
    parts = [catalog.model(name).parameters for name in ("mistral-7b-v0.3", "codellama-13b", "mistral-7b-v0.3")]
    assert weights.ours == pytest.approx(2 * sum(parts) / GB)
    assert l40s.ours > 1
    assert pcie.on_condition < pcie.ours
    assert swap.ours == pytest.approx(2 * parts[1] / 64e9)


def test_70b_and_r1_on_one_h200():
    h200, b200, full = lines("B4")
    share = plan_of("llama-3.1-70b", "h200-sxm-141gb").budget.size_bytes
    assert 2 * catalog.model("llama-3.1-70b").parameters > share
    assert h200.ours == 0 < h200.on_condition
    assert b200.ours >= 1
    assert full.ours == 8


def test_a_70b_replica_stays_inside_a_node():
    (cluster,) = lines("B3")
    assert cluster.ours <= 8


def test_kv_cache_and_weights():
    short, long, mha = lines("C2")
    assert KV_7B == 131_072
    assert short.ours == pytest.approx(KV_7B * 4096 / GB) == pytest.approx(0.537, abs=0.001)
    assert long.ours == pytest.approx(KV_7B * 32_768 / GB) == pytest.approx(4.29, abs=0.01)
    assert catalog.model("llama-2-7b").kv_bytes_per_token() == 524_288 == 4 * KV_7B
    assert mha.ours == pytest.approx(4 * short.ours)
    names = ("mistral-7b-v0.3", "llama-2-13b", "llama-3.1-70b")
    for one, name in zip(lines("C3"), names, strict=True):
        assert one.ours == pytest.approx(2 * catalog.model(name).parameters / GB)


def test_simple_agent():
    figure, choice = lines("C4")
    articles_sum = 14 + 20 * KV_7B * 4096 / GB
    assert articles_sum == pytest.approx(24.7, abs=0.05)
    assert figure.on_condition == pytest.approx(2 * 7.248 + 20 * KV_7B * 4096 / GB, abs=0.01)
    assert figure.ours > figure.on_condition
    assert choice.ours >= 20


def test_customer_service_agent():
    figure, choice = lines("C5")
    kv = 50 * 8192 * KV_NEMO / GB
    assert 26 + kv == pytest.approx(93, abs=0.2)  # with the article's 26 GB
    assert figure.on_condition == pytest.approx(2 * 12.248 + kv, abs=0.01)
    assert "would need 362" in figure.reason
    without_gqa = 2 * 13.016 + 50 * 8192 * KV_LLAMA_2_13B / GB
    assert without_gqa == pytest.approx(362, abs=0.5)
    assert choice.ours >= 50


def test_complex_reasoning_agent():
    figure, four, three = lines("C6")
    bare = 140 + 10 * 32_768 * KV_70B / GB
    assert bare == pytest.approx(247, abs=0.5)
    assert bare * 1.15 == pytest.approx(280, abs=5)
    assert 280 / (4 * 80) == 0.875
    assert figure.ours > bare
    assert four.ours >= 10
    with pytest.raises(UserError, match="does not divide the 64 attention heads"):
        plan_of("llama-3.1-70b", "h200-sxm-141gb", gpu_count=3, tensor_parallel_size=3)
    assert three.ours == 0
    assert three.on_condition >= 10


def test_orchestrator():
    figure, choice = lines("C7")
    articles_sum = 4 * 14 + 40 * KV_7B * 4096 / GB
    assert articles_sum == pytest.approx(77.5, abs=0.05)
    assert figure.ours == pytest.approx(8 * 7.248 + 40 * KV_7B * 4096 / GB, abs=0.01)
    assert (choice.ours, choice.on_condition) == (1, 2)


def test_overhead_and_headroom():
    (runtime,) = lines("C1")
    memory = plan_of("mistral-7b-v0.3", "h100-sxm-80gb", max_model_len=4096)
    rest = memory.gpu.memory_bytes - memory.weights.size_bytes - memory.pool.size_bytes
    assert runtime.ours == pytest.approx(rest / memory.weights.size_bytes)
    assert runtime.on_condition == pytest.approx(rest / memory.gpu.memory_bytes)
    usable, share = lines("C8")
    assert usable.ours < 48
    assert share.ours == memory.config.gpu_memory_utilization < 0.95


def test_customer_service_day_and_one_card():
    peak, day = lines("E4")
    assert peak.ours == pytest.approx(10_000 * 5 * 200 / 86_400 * 10) == pytest.approx(1157, abs=1)
    assert day.ours == 10_000 * (1000 + 1300 + 1600 + 1900 + 2200)  # each turn adds 100 and the 200 of the answer
    ten, fifty, _, enough = lines("E5")
    assert ten.ours < 10 * 2.0e12 / (2 * 12.248e9)  # ten rows a step, weights read once a step
    assert ten.on_condition == pytest.approx(6 * ten.ours, rel=0.05)  # 1,000 tokens of prompt beside 200 of output
    assert enough.ours == pytest.approx(fifty.ours / peak.ours)


def test_phases_follow_the_datasheet():
    prefill, decode = lines("D3")
    assert prefill.ours == pytest.approx(1, abs=0.25)
    assert decode.ours == pytest.approx(1.79 / 3.35, rel=0.25)


@pytest.mark.parametrize(
    ("section", "notebook", "rows"), [("opening", "00", 5), ("contradictions", "00", 2), ("contradictions", "02", 3)]
)
def test_tables_are_filled_in(section, notebook, rows):
    found = article.table(section, notebook)
    assert len(found) == rows
    assert not any(re.search(r"[{}]", text) for row in found for text in row.values())


def test_every_pattern_has_a_scenario_and_something_that_holds_it():
    found = article.patterns()
    assert [row["pattern"] for row in found] == [1, 2, 3, 4]
    for row in found:
        assert scenario.load(row["scenario"]).key == row["scenario"]
        assert row["held by"]
    assert "replicas of 8x" in found[2]["held by"]


FOUND = {
    "burst": 200, "burst_in_time": 0.16, "alone_in_time": 1.0, "recover_s": 3.5, "times": 50, "capacity": 30.0,
    "turns": 5.0, "needed": 500 / 60 * 5, "capacity_over_calls": 3.6, "capacity_over_sessions": 0.72,
    "vllm_hits": 0.87, "sglang_hits": 0.88, "hits_ahead": 0.01, "vllm_valid": 1.0, "sglang_valid": 1.0,
    "valid_ahead": 0.0, "files_needed": 10_064, "limits": 4, "limits_met": 3,
}  # fmt: skip


def test_lines_that_a_run_answers():
    found = article.lines("04", FOUND)
    assert [(one.id, one.verdict) for one in found] == [
        ("A1", CONDITION), ("A2", CONDITION), ("F4", NOT), ("F4", NOT), ("F8", HOLDS),
    ]  # fmt: skip
    assert not any(re.search(r"[{}]", one.reason) for one in found)
    assert "16%" in found[0].reason
    ahead = article.lines("04", FOUND | {"hits_ahead": 0.1, "capacity_over_sessions": 1.2})
    assert [ahead[1].verdict, ahead[2].verdict] == [HOLDS, HOLDS]


@pytest.mark.parametrize(
    ("turn_s", "short_turn_s", "in_time", "verdicts"),
    [(0.5, 0.3, (0.2, 0.0), [HOLDS, HOLDS]), (4.0, 0.3, (1.0, 0.9), [CONDITION, CONDITION]),
     (4.0, 0.1, (1.0, 1.0), [NOT, NOT])],
)  # fmt: skip
def test_lines_that_the_latency_budget_answers(turn_s, short_turn_s, in_time, verdicts):
    found = {"turn_s": turn_s, "short_turn_s": short_turn_s, "many_in_time": in_time[0], "many_voiced": in_time[1]}
    found |= {"few_sessions": 10, "many_sessions": 90, "token_times": 3.1, "ttft_times": 2.2, "wait_s": 0.05}
    found |= {"few": 12, "many": 60, "output_tokens": 200}
    ranking, budget = article.lines("03", found)
    assert [(ranking.id, ranking.verdict), (budget.id, budget.verdict)] == [("A3", verdicts[0]), ("D1", verdicts[1])]
    assert not any(re.search(r"[{}]", one.reason) for one in (ranking, budget))
