"""Scenarios: read strictly, held by GPUs, and decided."""

from dataclasses import replace

import pytest
import yaml

from kit import catalog, scenario
from kit.catalog.paths import DATA
from kit.decision import decide, replicas, sentences
from kit.errors import UserError
from kit.memory.sessions import Demand, answer
from kit.memory.shape import Term

KEYS = [path.stem for path in sorted((DATA / "scenarios").glob("*.yaml"))]
MINIMAL = {"model": "qwen3-8b", "sessions": 4, "context_tokens": 4096}


def decided(key: str, gpu: str, **flags) -> tuple[dict, list[str]]:
    case = scenario.load(key)
    spec = catalog.model(case.model)
    config = case.config(spec, gpu_count=case.gpu_count, **flags)
    found = decide(case, spec, catalog.gpu(gpu), config, case.demand())
    return found, sentences(case, case.demand(), found)


@pytest.mark.parametrize("key", KEYS)
def test_bundled_scenarios_grow_to_at_most_their_context(key):
    case = scenario.load(key)
    assert case.key == key
    assert len(case.growth_tokens) == case.turns
    assert case.growth_tokens[-1] <= case.context_tokens


def test_a_file_needs_three_fields(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    case = scenario.load(path)
    assert (case.key, case.gpu_count, case.sessions) == ("mine", 1, 4)
    assert case.config(catalog.model("qwen3-8b")).max_model_len == 4096


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sessions": 0}, "sessions: input should be greater than 0"),
        ({"sessions": "many"}, "sessions: input should be a valid integer"),
        ({"sesions": 4}, "sesions: extra inputs are not permitted"),
        ({"context_tokens": None}, "context_tokens"),
        ({"models": [{"role": "coder"}]}, "models.0.model: field required"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, change, told):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | change))
    with pytest.raises(UserError, match=r"wrong.yaml: ") as error:
        scenario.load(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="'absent': no such file; bundled: api-cluster"):
        scenario.load("absent")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="not a mapping"):
        scenario.load(tmp_path / "list.yaml")


def test_flags_that_are_not_given_stay_the_scenarios():
    case = scenario.load("reasoning")
    spec = catalog.model(case.model)
    assert case.config(spec, quantization="").quantization == "fp8"
    assert case.config(spec, quantization="int8").quantization == "int8"


@pytest.mark.parametrize(("count", "tensor", "pipeline"), [(1, 1, 1), (2, 2, 1), (3, 1, 3), (6, 2, 3), (8, 8, 1)])
def test_gpus_split_into_what_can_run(count, tensor, pipeline):
    spec = catalog.model("llama-3.1-70b")
    split = scenario.parallel(spec, scenario.EngineConfig(gpu_count=count))
    assert (split.tensor_parallel_size, split.pipeline_parallel_size) == (tensor, pipeline)


def test_the_interval_is_that_of_the_pool():
    case = scenario.load("customer-service")
    spec = catalog.model(case.model)
    held = scenario.hold(spec, catalog.gpu("h200-sxm-141gb"), case.config(spec), case.demand())
    low, high = held.sessions_interval
    assert low <= held.answer.max_concurrent_sessions <= high
    poor = replace(held.memory, pool=Term(held.memory.kv_cache_bytes_interval[0], 0.0))
    assert low == answer(poor, case.demand()).max_concurrent_sessions


def test_the_fewest_gpus_hold_the_demand_and_fewer_do_not():
    spec, gpu = catalog.model("mistral-nemo-2407"), catalog.gpu("l40s-48gb")
    demand = Demand(context_tokens=8192, sessions=50)
    config = scenario.EngineConfig(max_model_len=8192)
    fewest = scenario.smallest_count(spec, gpu, config, demand)
    count = fewest.memory.config.gpu_count
    assert fewest.answer.fits
    assert not scenario.hold(spec, gpu, replace(config, gpu_count=count // 2), demand).answer.fits
    assert scenario.smallest_count(spec, gpu, config, replace(demand, sessions=100_000)) is None


def test_replicas_hold_what_one_does_not():
    case = scenario.load("api-cluster")
    spec = catalog.model(case.model)
    node = replicas(spec, catalog.gpu("h100-sxm-80gb"), case.config(spec), case.demand())
    assert (node["replicas"] - 1) * node["sessions_each"] < case.sessions <= node["replicas"] * node["sessions_each"]


def test_a_card_that_fits_needs_no_change():
    found, lines = decided("customer-service", "h200-sxm-141gb")
    assert found["asked"] == found["recommended"]
    assert found["would_fit"] == []
    assert lines[1].endswith("fits.")
    assert any(line.startswith("Flags: --gpu-memory-utilization") for line in lines)


def test_a_card_too_small_for_the_weights_says_what_would_fit():
    found, lines = decided("customer-service", "rtx-4090-24gb")
    assert found["asked"]["limited_by"] == "weights"
    assert found["recommended"]["gpu_count"] > 1
    assert any("h200-sxm-141gb" in change for change in found["would_fit"])
    assert lines[1].endswith("does not fit.")


def test_nothing_that_fits_is_said():
    found, lines = decided("coding-agent", "l4-24gb")
    assert found["recommended"] is None
    assert found["would_fit"] == []
    assert "No other card or dtype tried here fits on 8 GPUs." in lines


def test_separate_engines_are_decided_together():
    found, lines = decided("multi-agent", "l40s-48gb")
    assert [share["model"] for share in found["separate_engines"]] == [
        "mistral-7b-v0.3",
        "codellama-13b",
        "mistral-7b-v0.3",
    ]
    assert "l40s-48gb" not in found["fitting_gpus"]
    assert "3 engines on 1x l40s-48gb do not fit" in lines[1]
    two, _ = decided("orchestrator", "h100-pcie-80gb")
    assert {share["gpu"] for share in two["separate_engines"]} == {0, 1}


def test_paused_sessions_that_may_be_evicted():
    found, lines = decided("voice-agent", "l40s-48gb")
    assert found["asked"]["sessions"] < found["paused_evicted"]["sessions"]
    assert any(line.startswith("With the paused evicted") for line in lines)


def test_a_context_beyond_the_models_is_no_question_of_gpus():
    case, spec = scenario.load("customer-service"), catalog.model("opt-125m")
    found = decide(case, spec, catalog.gpu("h200-sxm-141gb"), case.config(spec), case.demand())
    assert found["recommended"] is None
    assert found["replicas"] is None
    assert "No GPU helps: opt-125m reads at most 2,048 tokens." in sentences(case, case.demand(), found)
