"""The search: finds what a grid finds, on few starts, resumes without measuring twice, and says when it cannot."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kit import catalog, workload
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.tune import Boot, Goal, Level, Offer, Setup, Store, VirtualMachine, tune
from kit.tune.companions import companions
from kit.tune.limits import limits
from kit.tune.search import alike, choose, decides

CHAT = workload.load("simple-chat")
OFFER = Offer(CHAT, 600.0, sessions=110, burst=30)
LIMITS = Goal(2.0, 0.08)
SMALL = ("llama-3.1-8b", "a10g-24gb")


def virtual(goal: Goal = LIMITS, truth: int | None = 3) -> VirtualMachine:
    parts = catalog.model(SMALL[0]), catalog.gpu(SMALL[1])
    return VirtualMachine(*parts, EngineConfig(), OFFER, goal, truth)


def setup_of(machine: VirtualMachine, expected: int | None = None) -> Setup:
    return Setup(*machine.parts, machine.config, expected)


def run(machine: VirtualMachine, store: Store | None = None, max_boots: int = 3, **given):
    return tune(machine, setup_of(machine, **given), machine.goal, store or Store(None, {}), max_boots)


@pytest.mark.parametrize("expected", [4, None, 200])
def test_a_hidden_machine_is_tuned_to_what_a_grid_finds(expected: int | None) -> None:
    machine = virtual()
    found = run(machine, expected=expected)
    assert (found.status, found.confirmed) == ("resolved", True)
    assert found.boots <= 3
    chosen = found.recommended["max_num_seqs"]
    grid = {}
    for n in {2, 4, 8, 16, 32, 64, 128, 256, chosen}:
        boot = machine.boot({"max_num_seqs": n}, 1)
        grid[n] = sum(machine.open_loop(boot, seed).goodput_requests_per_s for seed in (21, 22))
    assert grid[chosen] >= 0.95 * max(grid.values())
    assert min(grid.values()) < 0.5 * max(grid.values())  # there was something to find
    confirming = [x for x in found.evidence if x["max_num_seqs"] == chosen and x["kind"] == "open"]
    assert {x["seed"] for x in confirming if x["concurrency"] is None} == {1, 2}


def test_one_start_measures_but_does_not_confirm() -> None:
    found = run(virtual(), max_boots=1)
    assert (found.status, found.confirmed, found.boots) == ("unresolved", False, 1)
    assert "not confirmed" in found.notes[0]
    assert found.recommended["max_num_seqs"] > 1


@pytest.mark.parametrize(
    ("goal", "text"),
    [(Goal(0.001, 1.0), "TTFT limit 0.001 s: one turn alone"), (Goal(9.0, 0.002), "TPOT limit 0.002 s")],
)
def test_a_limit_below_one_turn_alone_is_infeasible(goal: Goal, text: str) -> None:
    found = run(virtual(goal))
    assert (found.status, found.limited_by, found.recommended, found.boots) == ("infeasible", "slo", {}, 1)
    assert text in found.notes[0]
    assert len(found.evidence) == 1
    alone = found.evidence[0]
    seen = alone["ttft_s" if "TTFT" in text else "tpot_s"]["p50"]
    assert f"takes {seen:.3g} s" in found.notes[0]


class StoppedError(Exception):
    pass


def counting(machine: VirtualMachine, stop_after: int | None = None) -> list[tuple]:
    """Make the machine note what it measures, and fail once it has measured so much."""
    seen: list[tuple] = []

    def noting(measure):
        def measured(boot, *given):
            if len(seen) == stop_after:
                raise StoppedError
            seen.append((boot.index, measure.__name__, *given))
            return measure(boot, *given)

        return measured

    machine.closed_loop, machine.open_loop = noting(machine.closed_loop), noting(machine.open_loop)
    return seen


@pytest.mark.parametrize("after", [0, 3, 9])
def test_stopped_and_started_again_measures_nothing_twice(after: int, tmp_path: Path) -> None:
    whole = virtual(truth=None)
    every = counting(whole)
    expected = run(whole)
    file = tmp_path / "tuning" / "levels.jsonl"
    first, second = virtual(truth=None), virtual(truth=None)
    before, later = counting(first, after), counting(second)
    with pytest.raises(StoppedError):
        run(first, Store(file, {"model": "m"}))
    with file.open("a") as half:
        half.write('{"boot": 1, "kind": "op')  # a kill in the middle of a line
    assert run(second, Store(file, {"model": "m"})) == expected
    assert before + later == every
    assert run(virtual(truth=None), Store(file, {"model": "m"})) == expected
    kept = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert sum("ttft_s" in line for line in kept) == len(every)
    with pytest.raises(UserError, match=r"levels\.jsonl holds a tuning with another model"):
        Store(file, {"model": "other"})


def level(n: int, **given) -> Level:
    values = {
        "boot": 1, "max_num_seqs": 256, "kind": "open", "concurrency": n, "seed": 1, "n": 1000, "duration_s": 100.0,
        "requests_per_s": 10.0, "offered_requests_per_s": 10.0, "output_tokens_per_s": 100.0,
        "goodput_requests_per_s": 5.0, "slo_attainment_fraction": 0.5, "slo_attainment_interval": (0.4, 0.6),
        "ttft_attainment_fraction": 1.0, "tpot_attainment_fraction": 1.0, "ttft_s": {"mean": 0.1}, "tpot_s": {},
        "input_tokens_mean": 500.0, "output_tokens_mean": 10.0, "running_mean": float(n), "kv_cache_usage_mean": 0.0,
        "kv_cache_usage_max": 0.5, "preemptions": 0, "prefix_hit_fraction": 0.0,
    }  # fmt: skip
    return Level(**values | given)


def test_limits_by_each_cause() -> None:
    boot, goal = Boot(1, {}, 256, 100_000), Goal(1.0, 1.0)
    tpot = {1: 1.0, 8: 1.0, 16: 0.98, 32: 0.5, 64: 0.0}
    rate = {1: 1.0, 8: 7.0, 16: 9.0, 32: 10.0, 64: 10.1}
    levels = [
        level(n, kind="closed", tpot_attainment_fraction=tpot[n], requests_per_s=rate[n],
              kv_cache_usage_mean=0.1 + 0.01 * n)
        for n in tpot
    ]  # fmt: skip
    found = {one.name: one for one in limits(levels, goal, boot, lambda n: 100_000 if n > 80 else 105_000)}
    assert 16 < found["tpot"].at < 20
    low, high = found["tpot"].interval
    assert low <= found["tpot"].at <= high <= 32
    assert (found["ttft"].at, found["ttft"].interval) == (None, None)
    assert found["kv_cache"].at == 85  # 0.95 of the pool, less 10,000 shared tokens, over 1,000 for each turn
    assert found["knee"].at == 32
    growing = [replace(one, requests_per_s=float(one.limit)) for one in levels]
    assert {one.name: one.at for one in limits(growing, goal, boot, lambda n: None)}["knee"] is None


def curve(goodputs: dict[int, float], **given) -> dict[int, Level]:
    return {n: level(n, goodput_requests_per_s=good, **given.get(f"at_{n}", {})) for n, good in goodputs.items()}


def test_of_values_alike_the_one_by_the_limit_and_never_the_lowest_step() -> None:
    edge = curve({8: 2.0, 16: 5.0, 24: 5.01, 64: 5.0, 256: 4.99})
    assert alike(edge) == [16, 24, 64, 256]
    assert choose(edge, begin=10) == 23  # right below 16 goodput falls
    assert choose(curve({8: 2.0, 16: 5.0, 20: 5.0}), begin=10) == 20
    assert choose(edge, begin=70) == 64
    peak = curve({16: 4.0, 32: 5.0, 64: 4.0})
    assert choose(peak, begin=16) == 32
    flat = curve({16: 5.0, 32: 5.0, 256: 5.0})
    assert choose(flat, begin=16) == 23


def test_what_decides() -> None:
    worse = {"at_64": {"tpot_attainment_fraction": 0.2}}
    assert decides(curve({16: 3.0, 32: 5.0, 64: 3.0}, **worse), 32) == "tpot"
    assert decides(curve({16: 3.0, 32: 5.0, 64: 3.0}, at_64={"preemptions": 200}), 32) == "kv_cache"
    assert decides(curve({16: 3.0, 32: 5.0, 64: 3.0}, at_64={"ttft_attainment_fraction": 0.1}), 32) == "ttft"
    assert decides(curve({16: 3.0, 32: 5.0, 64: 5.0}), 32) == "ttft"
    assert decides(curve({16: 3.0, 32: 5.0, 64: 5.0}, at_32={"kv_cache_usage_max": 1.0}), 32) == "kv_cache"
    assert decides(curve({16: 5.0, 32: 5.0, 64: 5.0}), 32) == "load"


class Curve:
    """Answers by formula: good turns per second by most turns at once, each start its share of them."""

    def __init__(self, goodput, carried: int, later_starts: float = 1.0) -> None:
        self.goodput, self.carried, self.later_starts = goodput, carried, later_starts

    def boot(self, flags, index):
        return Boot(index, dict(flags), flags["max_num_seqs"])

    def closed_loop(self, boot, concurrency, seed, min_turns):
        met = 1.0 if concurrency <= self.carried else 0.0
        given = {"slo_attainment_fraction": met, "tpot_attainment_fraction": met, "requests_per_s": float(concurrency)}
        return level(concurrency, boot=boot.index, max_num_seqs=boot.max_num_seqs, kind="closed", seed=seed, **given)

    def open_loop(self, boot, seed, max_concurrency=None):
        one = level(max_concurrency or 0, boot=boot.index, max_num_seqs=boot.max_num_seqs, seed=seed)
        share = 1.0 if boot.index == 1 else self.later_starts
        good = share * self.goodput(min(boot.max_num_seqs, max_concurrency or boot.max_num_seqs))
        return replace(one, concurrency=max_concurrency, goodput_requests_per_s=good)


def by_formula(machine: Curve, expected: int, max_boots: int = 3):
    setup = Setup(catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb"), EngineConfig(), expected)
    return tune(machine, setup, Goal(1.0, 0.1), Store(None, {}), max_boots)


def test_a_first_start_too_small_is_followed_by_a_larger_one() -> None:
    found = by_formula(Curve(lambda n: float(min(n, 200)), carried=50), expected=8)
    assert found.boots <= 3
    assert found.confirmed
    assert {64, 256} <= {one["max_num_seqs"] for one in found.evidence}
    assert found.recommended["max_num_seqs"] >= 198


def test_a_goodput_that_does_not_come_again_is_unresolved() -> None:
    peak = Curve(lambda n: 10.0 - abs(n - 40) / 10, carried=30, later_starts=0.5)
    found = by_formula(peak, expected=32)
    assert (found.status, found.confirmed) == ("unresolved", False)
    good = peak.goodput(found.recommended["max_num_seqs"])
    assert f"gave {good / 2:.3g} good turns/s on its own start, {good:.3g} before" in found.notes[0]


@pytest.mark.parametrize("expected", [4, 32, 500])
@pytest.mark.parametrize("best", [3, 40, 180])
def test_a_peak_is_found_wherever_the_search_begins(best: int, expected: int) -> None:
    found = by_formula(Curve(lambda n: 10.0 - 3 * abs(np.log2(n / best)), carried=max(1, best // 2)), expected=expected)
    assert found.boots <= 3
    assert 10.0 - 3 * abs(np.log2(found.recommended["max_num_seqs"] / best)) > 9.5


ADMISSION = {
    "vllm": ("--max-num-queued-reqs", 64 + 20),
    "sglang": ("--max-queued-requests", 20),
    "ollama": ("OLLAMA_MAX_QUEUE", 20),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "tgi", "ollama"])
def test_companions_in_each_engines_words(engine: str) -> None:
    data = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests", "tensorrt-llm": "--max_batch_size",
            "tgi": "--max-concurrent-requests", "ollama": "OLLAMA_NUM_PARALLEL"}  # fmt: skip
    parts = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb")
    levels = [level(1, ttft_s={"mean": 0.05}, requests_per_s=1.0), level(64)]
    values, arguments, reasons = companions(*parts, EngineConfig(engine=engine), Goal(2.0, 0.05), 64, levels)
    assert arguments[data[engine]] == "64"
    assert set(values) <= {*reasons, "max_num_seqs"}
    flag, queued = ADMISSION.get(engine, (None, None))
    assert values.get("max_num_queued_reqs") == queued
    assert flag is None or arguments[flag] == str(queued)
    if engine == "vllm":
        assert arguments["--max-num-queued-tokens"] == "20000"  # 500 tokens in 50 ms, for 2 s
        old = EngineConfig(engine_version="0.20.0")
        assert "max_num_queued_reqs" not in companions(*parts, old, Goal(2.0, 0.05), 64, levels)[0]
        assert "max_num_queued_reqs" not in companions(*parts, EngineConfig(), Goal(np.inf, 0.05), 64, levels)[0]


def test_a_closed_level_ends_by_time_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = virtual()
    boot = machine.boot({"max_num_seqs": 64}, 1)
    whole = machine.closed_loop(boot, 16, 1, 200)
    monkeypatch.setattr("kit.tune.levels.LONGEST_S", whole.duration_s / 4)
    monkeypatch.setattr("kit.tune.virtual.LONGEST_S", whole.duration_s / 4)
    short = machine.closed_loop(boot, 16, 1, 200)
    assert whole.warnings == ()
    assert 0 < short.n < whole.n / 2
    assert "turns were not sent" in short.warnings[0]
