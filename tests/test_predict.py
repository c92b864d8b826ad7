"""kit predict: a closed loop that obeys Little's law, intervals, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit import catalog
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.predict import Ask, predict
from kit.steptime import fitted, step_time

ROOT = Path(__file__).resolve().parents[1]
CASE = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb", "--input-tokens", "1024", "--output-tokens", "128")


def ask(name: str = "llama-3.1-8b", card: str = "h100-sxm-80gb", flags: dict | None = None, **what) -> dict:
    what = {"input_tokens": 1024, "output_tokens": 128} | what
    return predict(catalog.model(name), catalog.gpu(card), EngineConfig(**flags or {}), Ask(**what))


def test_a_closed_loop_keeps_its_streams_busy() -> None:
    for streams in (1, 8, 64):
        done = ask(concurrency=streams)
        in_flight = done["requests_per_s"] * done["e2el_s"]["mean"]  # Little's law
        assert 0.8 * streams < in_flight < 1.01 * streams
        spent = done["ttft_s"]["mean"] + done["tpot_s"]["mean"] * 127
        assert done["e2el_s"]["mean"] == pytest.approx(spent, rel=0.03)


def test_more_streams_give_more_tokens_and_longer_waits() -> None:
    few, many = ask(concurrency=4), ask(concurrency=128)
    assert many["output_tokens_per_s"] > 3 * few["output_tokens_per_s"]
    assert many["ttft_s"]["mean"] > few["ttft_s"]["mean"]
    assert many["tpot_s"]["mean"] > few["tpot_s"]["mean"]


def test_the_opening_wave_counts() -> None:
    done = ask(concurrency=128)
    assert done["ttft_s"]["mean"] > 1.3 * done["ttft_s"]["p50"]
    assert done["ttft_s"]["p99"] > 3 * done["ttft_s"]["p50"]


def test_a_prefix_hit_saves_prefill_but_not_tokenising() -> None:
    name, card = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb")
    config = resolve(EngineConfig(), name, card)
    cold, warm = (ask(input_tokens=50_000, concurrency=1, prefix_hit_fraction=f) for f in (0.0, 0.99))
    before_s = step_time(name, card, config).request_s(50_000)
    assert warm["ttft_s"]["mean"] < 0.3 * cold["ttft_s"]["mean"]
    assert warm["ttft_s"]["mean"] > before_s


def test_a_slow_rate_is_served_as_it_comes_and_a_fast_one_is_not() -> None:
    slow, fast = ask(request_rate=1.0), ask(request_rate=500.0)
    assert slow["requests_per_s"] == pytest.approx(1.0, rel=0.15)
    assert slow["intervals"]["output_tokens_per_s"][1] <= max(128.0, slow["output_tokens_per_s"])
    assert fast["requests_per_s"] < 250
    assert fast["ttft_s"]["mean"] > 3 * slow["ttft_s"]["mean"]


def test_intervals_hold_the_value_and_widen_away_from_the_data() -> None:
    near, far = ask(concurrency=8), ask(card="l4-24gb", concurrency=8)
    for done in (near, far):
        for name in ("ttft_s", "tpot_s"):
            low, high = done["intervals"][f"{name}_mean"]
            assert low < done[name]["mean"] < high
    width = [done["intervals"]["tpot_s_mean"][1] / done["tpot_s"]["mean"] for done in (near, far)]
    assert width[1] >= width[0]
    assert any("guess" in text for text in far["warnings"])


def test_what_limits_is_named() -> None:
    assert ask(concurrency=1, output_tokens=512)["limited_by"] == "weight reads"
    assert ask(concurrency=64, input_tokens=8192, output_tokens=16)["limited_by"] == "prefill"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "tgi", "ollama"])
def test_every_engine_answers(engine: str) -> None:
    done = ask(flags={"engine": engine}, concurrency=4)
    assert 0.001 < done["tpot_s"]["mean"] < 1


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"concurrency": 0}, "--concurrency must be above 0, got 0"),
        ({"concurrency": 4, "input_tokens": 0}, "--input-tokens must be above 0, got 0"),
        ({"concurrency": 4, "output_tokens": -3}, "--output-tokens must be above 0"),
        ({"concurrency": 4, "prefix_hit_fraction": 1.2}, "--prefix-hit-fraction must lie between 0 and 1, got 1.2"),
        ({"concurrency": 4, "request_rate": 2.0}, "give either --concurrency or --request-rate"),
        ({}, "give either --concurrency or --request-rate"),
        ({"concurrency": 4, "input_tokens": 131_072}, "exceed the max_model_len of 131072 tokens"),
    ],
)
def test_what_no_server_could_be_asked_is_refused(what: dict, text: str) -> None:
    with pytest.raises(UserError, match=text.replace("(", r"\(")):
        ask(**what)


def kit(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from kit.cli import main; main()", "predict", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_command_prints_one_object() -> None:
    done = kit(*CASE, "--concurrency", "8", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= {
        "ttft_s", "tpot_s", "itl_s", "e2el_s", "output_tokens_per_s", "requests_per_s", "intervals", "limited_by",
        "warnings",
    }  # fmt: skip
    assert set(result["intervals"]) == {"ttft_s_mean", "ttft_s_p50", "tpot_s_mean", "output_tokens_per_s"}
    assert kit(*CASE, "--concurrency", "8", "--json").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--concurrency", "8", "--slo-ttft-s", "0"), "--slo-ttft-s must be above 0, got 0"),
        (("--concurrency", "8", "--slo-tpot-s", "0"), "--slo-tpot-s must be above 0, got 0"),
        (("--concurrency", "8", "--input-tokens", "0"), "--input-tokens must be above 0, got 0"),
        (("--concurrency", "8", "--prefix-hit-fraction", "1.2"), "must lie between 0 and 1, got 1.2"),
        (("--concurrency", "8", "--model", "lama-3.1-8b"), "unknown model 'lama-3.1-8b'"),
        (("--concurrency", "8", "--calibration", "nowhere.json"), "--calibration nowhere.json: No such file"),
        (("--concurrency", "8", "--quantization", "fp7"), "fp7"),
        (("--concurrency", "8", "--gpu-count", "3"), "--tensor-parallel-size 3"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], text: str) -> None:
    done = kit(*CASE, *arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_fit_schedules_as_the_simulator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast closed loop of the fit against the simulator, on equal lengths of arrival."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from closed_loop import Limits, Load, Play

    for streams, isl, osl, engine in ((8, 1024, 512, "vllm"), (64, 2048, 256, "vllm"), (32, 1024, 256, "sglang")):
        name, card = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb")
        config = resolve(EngineConfig(engine=engine), name, card)
        steps = step_time(name, card, config)
        load = Load(streams, isl, osl, fitted(name, card, config).length_spread, 10 * streams)
        limits = Limits(config.max_num_batched_tokens, config.max_num_seqs, engine != "sglang")
        ttft, tpot = Play(steps.seconds, steps.decode_line, load, limits).bins()
        mean = [sum(steps.seconds(*row[:5]) * row[5] for row in one) for one in (ttft, tpot)]
        done = ask(flags={"engine": engine}, input_tokens=isl, output_tokens=osl, concurrency=streams)
        assert mean[1] == pytest.approx(done["tpot_s"]["mean"], rel=0.03)
        assert mean[0] + steps.request_s(isl, streams) == pytest.approx(done["ttft_s"]["mean"], rel=0.08)
