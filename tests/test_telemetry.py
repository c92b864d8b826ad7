"""One reader for every engine's page, and NVML where there is none."""

from types import SimpleNamespace

import pynvml
import pytest

from kit.engine_config import ENGINES, engine_data
from kit.telemetry import GpuSampler, ServerMetrics, read_page, spellings

VLLM = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a, \\"b\\" }"} 3.0
vllm:num_requests_running{engine="1",model_name="x"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.1
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 2.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",kv_cache_size_tokens="126256",sliding_window="None"} 1.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 2.0
vllm:time_to_first_token_seconds_count{engine="0"} 2.0
vllm:time_to_first_token_seconds_sum{engine="0"} 1.5
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.5"} 2.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf"} 2.0
vllm:time_to_first_token_seconds_count{engine="1"} 2.0
vllm:time_to_first_token_seconds_sum{engine="1"} 0.5
"""


def read(page: str) -> ServerMetrics:
    metrics = read_page(page)
    assert metrics is not None
    return metrics


def test_ranks_add_up_and_fractions_are_averaged():
    page = read(VLLM)
    assert page.engine == "vllm"
    assert page.running == 7
    assert page.kv_cache_usage == pytest.approx(0.3)
    assert page.preemptions == 2
    assert page.kv_cache_tokens == 126256
    ttft = page.histograms["ttft"]
    assert (ttft.count, ttft.sum) == (4, 2.0)


def test_what_is_not_there_is_none_and_never_zero():
    page = read(VLLM)
    assert page.waiting is None
    assert page.prefix_hits is None
    assert page.prefix_hit_rate is None
    assert "e2el" not in page.histograms


def test_a_counter_that_appears_with_its_first_event_counts_zero_before():
    page = read("sglang:num_running_reqs 1.0\n")
    assert page.preemptions == 0
    assert page.prefix_hits == 0
    assert page.waiting is None


def test_the_gauge_of_the_last_step_is_not_taken_for_a_count_of_preemptions():
    assert read("sglang:num_retracted_reqs 5.0\nsglang:num_running_reqs 1\n").preemptions == 0


def test_an_old_spelling_is_read_and_the_new_one_wins():
    old = "vllm:gpu_cache_usage_perc 0.25\n"
    assert read(old).kv_cache_usage == 0.25
    assert read(old + "vllm:kv_cache_usage_perc 0.5\n").kv_cache_usage == 0.5


@pytest.mark.parametrize("page", ["", "go_threads 3\n", "<html>404</html>", '[{"iter": 1}]', "{"])
def test_a_page_of_nobody_we_know(page: str):
    assert read_page(page) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_every_table_speaks_of_the_same_quantities(engine: str):
    table = engine_data(engine)["metrics"]
    quantities = set(ServerMetrics.__dataclass_fields__) - {"engine", "histograms"}
    if engine == "ollama":  # prints no metrics at all
        assert table["path"] is None
        assert not table["names"]
        return
    assert set(table["names"]) == quantities
    assert set(table["histograms"]) == {"ttft", "itl", "tpot", "e2el", "queue_time"}
    assert set(table["born_with_first_event"]) <= quantities
    known, removed = set(table["known"].split()), set(table["removed"])
    for eras in (*table["names"].values(), *table["histograms"].values()):
        for index, name in enumerate(spellings(eras)):
            assert name.startswith(table["prefix"])
            stem = name.partition("@")[0].removeprefix(table["prefix"]).removesuffix("_total")
            stem = stem.removesuffix("_sum")
            assert (stem in known) == (index == 0), name  # only the newest spelling is printed today
            assert (table["prefix"] + stem in removed) == (index > 0), name


class FakeNvml:
    """NVML's calls with one GPU; the real library needs a driver."""

    NVMLError = pynvml.NVMLError

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=50),
            "nvmlDeviceGetPowerUsage": 350_000,
        }
        return lambda *_: answers[name]


def test_gpu_samples_are_averaged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    sampler = GpuSampler()
    sampler.poll()
    sampler.poll()
    assert len(sampler.samples) == 2
    assert sampler.result() == {
        "gpus": 1,
        "utilization_fraction": 0.5,
        "power_w": 350.0,
        "memory_used_bytes": 3 * 2**30,
    }


def test_without_a_driver_there_are_no_samples(monkeypatch: pytest.MonkeyPatch):
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    sampler = GpuSampler()
    sampler.poll()
    assert sampler.result() is None
