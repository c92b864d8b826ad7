"""Sessions in virtual time: jumps equal steps, nothing is lost, answers by hand, the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sse_server import paced, serving

from kit import catalog, workload
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.loadgen import Options, Target, measure
from kit.loadgen.plan import own_arrivals
from kit.scheduler import SchedulerConfig
from kit.simulator import COLUMNS, ROUTINGS, Load, Simulation, SimulationConfig, replica, study
from kit.simulator.intervals import IntervalHistogram
from kit.steptime import fitted
from kit.workload import Session, Turn

SHARED = Path(os.environ.get("KIT_SHARED", Path(__file__).parents[2] / "shared"))
ROOT = Path(__file__).parents[1]


class Line:
    """Step times that can be added up by hand."""

    def __init__(self, base_s=0.01, token_s=1e-4, context_s=0.0) -> None:
        self.base_s, self.token_s, self.context_s = base_s, token_s, context_s

    def step_s(self, chunks, decodes, context):
        tokens = sum(new for new, _ in chunks)
        return self.base_s + self.token_s * tokens + self.context_s * context

    def decode_line(self, decodes):
        return self.base_s, self.context_s


def table(sim: Simulation) -> dict[str, np.ndarray]:
    rows = np.array(sim.turns).reshape(-1, len(COLUMNS))
    return {name: rows[:, index] for index, name in enumerate(COLUMNS)}


def run(sessions, step_time=None, **changes) -> Simulation:
    limits = {"kv_blocks": 1000} | changes.pop("limits", {})
    config = SimulationConfig(SchedulerConfig(**limits), **changes)
    return Simulation(config, step_time or Line()).run(sessions)


def test_one_session_by_hand() -> None:
    turns = [Turn(100, 3, pause_after_s=1.0), Turn(28, 2)]
    sim = run([Session(0, 5.0, turns)])
    rows = table(sim)
    # prefill 0.01 + 100 x 1e-4, then two decode steps; 96 of 103 tokens with KV are whole blocks
    assert rows["first_s"][0] == pytest.approx(5.02)
    assert rows["end_s"][0] == pytest.approx(5.04)
    assert rows["arrival_s"][1] == pytest.approx(6.04)
    assert rows["input_len"][1] == 131
    assert rows["hit_tokens"][1] == 96
    assert rows["first_s"][1] == pytest.approx(6.04 + 0.01 + 35 * 1e-4)
    assert rows["pause_s"].tolist() == [-1.0, 1.0]


def test_api_and_tokeniser_come_before_the_scheduler() -> None:
    turns = [Turn(100, 3, pause_after_s=1.0), Turn(28, 2)]
    load = [Session(0, 0.0, turns), Session(1, 0.0, [Turn(5000, 1)])]
    found = run(load, request_s=lambda tokens, at_once: 1e-3 * tokens + at_once, limits={"max_model_len": 4096})
    rows = table(found)
    # 0.1 s for its tokens and 1 s for the one request there; then prefill and two decode steps
    assert rows["admitted_s"][0] == pytest.approx(1.1)
    assert rows["first_s"][0] == pytest.approx(1.12)
    assert rows["admitted_s"][1] - rows["arrival_s"][1] == pytest.approx(0.131 + 1)  # the long one never came in
    assert list(found.refusals) == ["5001 tokens exceed max_model_len 4096"]
    assert found.replicas[0].arriving == found.replicas[0].backlog_tokens == 0
    assert found.in_flight == {}


def test_a_newcomer_joins_at_the_end_of_the_step_under_way() -> None:
    sim = run([Session(0, 0.0, [Turn(10, 101)]), Session(1, 0.0555, [Turn(10, 1)])])
    rows = table(sim)
    newcomer = rows["key"] == 1
    assert rows["admitted_s"][newcomer][0] == pytest.approx(0.011 + 5 * 0.01)
    assert sum(sim.intervals.counts) == 100


def parent_of_two() -> Session:
    """Two sub-agents, the slower one of two turns; then a pause, and the parent goes on."""
    slow = Session(2, 0.05, [Turn(10, 21, 0.2, "tool"), Turn(10, 21)])
    children = [Session(1, 0.0, [Turn(10, 11)]), slow]
    return Session(0, 0.0, [Turn(10, 2, 0.1, "tool", children=children), Turn(10, 2)])


def waits(names, turns, begun, ended) -> dict[tuple[str, int], float]:
    """Seconds from the end of what each turn but the very first waited for to its beginning."""
    calls = list(zip(names, turns, begun, ended, strict=True))
    end = {(name, turn): end_s for name, turn, _, end_s in calls}
    end["parent", 0, "joined"] = max(end_s for (name, *_), end_s in end.items() if name != "parent")
    before = {("parent", 1): ("parent", 0, "joined"), ("slow", 1): ("slow", 0)}
    return {
        (name, turn): round(begun_s - end[before.get((name, turn), ("parent", 0))], 6)
        for name, turn, begun_s, _ in calls
        if (name, turn) != ("parent", 0)
    }


def test_a_pause_counts_from_the_join_here_and_in_the_load_generator(tmp_path: Path) -> None:
    rows = table(run([parent_of_two()]))
    names = {0: "parent", 1: "fast", 2: "slow"}
    simulated = waits(map(names.get, rows["key"]), rows["turn"], rows["arrival_s"], rows["end_s"])
    assert simulated == {("fast", 0): 0.0, ("slow", 0): 0.05, ("slow", 1): 0.2, ("parent", 1): 0.1}
    with serving(paced(0.01, 0.005)) as server:
        options = Options(log=lambda line: None)
        measure(Target(server.base_url, "sse"), [own_arrivals([parent_of_two()])], options, tmp_path / "run")
    sent = [json.loads(line) for line in (tmp_path / "run" / "requests.jsonl").read_text().splitlines()]
    names = {"0": "parent", "0.1": "fast", "0.2": "slow"}
    columns = ([one[name] for one in sent] for name in ("turn", "scheduled_s", "end_s"))
    assert waits([names[one["session"]] for one in sent], *columns) == simulated


def test_children_of_a_last_turn_are_played() -> None:
    child = Session(9, 0.2, [Turn(10, 5)])
    sim = run([Session(0, 0.0, [Turn(10, 1, children=[child])])])
    assert (sim.planned, len(table(sim)["end_s"])) == (2, 2)


def test_kv_kept_or_lost_at_a_pause() -> None:
    session = Session(0, 0.0, [Turn(160, 1, 1.0), Turn(16, 1)], shared_prefix_tokens=160)
    assert table(run([session]))["hit_tokens"].tolist() == [0, 320]
    assert table(run([session], keep_kv=False))["hit_tokens"].tolist() == [0, 160]


def test_warm_and_cold_starts() -> None:
    session = Session(0, 0.0, [Turn(40, 1)], shared_prefix_tokens=160)
    assert table(run([session], warm=True))["hit_tokens"].tolist() == [160]
    cold = run([session, Session(1, 0.0, [Turn(40, 1)])], ready_after_s=30.0)
    assert table(cold)["admitted_s"].tolist() == [30.0, 30.0]


def test_routing_and_its_prefix_hits() -> None:
    turns = [Turn(160, 1, 1.0) for _ in range(6)]
    sessions = [Session(i, i * 0.1, [replace(t) for t in turns]) for i in range(3)]
    hits = {}
    for routing in ROUTINGS:
        rows = table(run(sessions, replicas=2, routing=routing))
        hits[routing] = rows["hit_tokens"].sum()
        if routing == "session":
            for key in range(3):
                assert len(set(rows["replica"][rows["key"] == key])) == 1
    assert hits["session"] == hits["prefix"] > hits["round-robin"]
    with pytest.raises(UserError, match=r"unknown routing 'sticky'.*round-robin"):
        run(sessions, routing="sticky")


def test_prefix_routing_sees_what_a_jump_has_evicted_so_far() -> None:
    sessions = [
        Session(0, 0.0, [Turn(16, 1)], prefix_id=7, shared_prefix_tokens=128),
        Session(1, 0.1, [Turn(144, 170)]),  # grows over the cached prefix on the same replica
        Session(2, 1.79, [Turn(16, 1)], prefix_id=7, shared_prefix_tokens=128),
    ]
    rows = table(run(sessions, routing="prefix", replicas=2, limits={"kv_blocks": 20}))
    assert dict(zip(rows["key"], rows["replica"], strict=True)) == {0: 0, 1: 0, 2: 1}


def test_refused_and_unfinished_turns_are_counted() -> None:
    sessions = [
        Session(0, 0.0, [Turn(5000, 10), Turn(1, 1)]),
        Session(1, 0.0, [Turn(10, 10, 100.0), Turn(1, 1)]),
    ]
    config = SimulationConfig(SchedulerConfig(kv_blocks=1000, max_model_len=4096), until_s=50.0)
    result = study(config, Line(), Recorded(sessions), 0.5)
    assert [result[k] for k in ("turns", "completed", "refused", "unfinished")] == [4, 1, 1, 2]
    assert result["slo_attainment_fraction"] == 0.5
    assert list(result["refusals"]) == ["5010 tokens exceed max_model_len 4096"]
    assert result["simulated_s"] == 50.0


class Recorded(Load):
    """A load of given sessions."""

    def __init__(self, sessions) -> None:
        super().__init__(None)
        object.__setattr__(self, "given", sessions)

    def stream(self):
        return self.given, set()

    def first_turns(self, count):
        return [Session(i, 0.0, [Turn(100, 5)]) for i in range(count)]

    def warnings(self):
        return []


turns_drawn = st.builds(
    Turn,
    new_tokens=st.integers(1, 90), output_len=st.integers(1, 60),
    pause_after_s=st.sampled_from([0.0, 0.01, 0.35, 2.0]),
    compact_to=st.sampled_from([None, None, None, 20]),
)  # fmt: skip
leaf = st.builds(
    Session, key=st.integers(50, 60), arrival_s=st.sampled_from([0.0, 0.02]),
    turns=st.lists(turns_drawn, min_size=1, max_size=2), prefix_id=st.integers(5, 6),
    shared_prefix_tokens=st.sampled_from([0, 40]),
)  # fmt: skip
family = st.builds(
    lambda turns, children: [
        replace(turn, children=children if place == 0 else []) for place, turn in enumerate(turns)
    ],
    st.lists(turns_drawn, min_size=1, max_size=4),
    st.lists(leaf, max_size=2),
)
many = st.lists(
    st.builds(
        Session, key=st.integers(0, 9), arrival_s=st.sampled_from([0.0, 0.011, 0.2, 0.21, 1.0]),
        turns=family, prefix_id=st.integers(0, 2), shared_prefix_tokens=st.sampled_from([0, 33, 64]),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    many, st.sampled_from(ROUTINGS), st.integers(12, 60), st.sampled_from([1, 16]),
    st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([None, 0.7]),
    st.sampled_from([(0.01, 1e-4, 1.7e-7), (0.01, 0.0, 0.0)]),
)  # fmt: skip
def test_jumps_equal_steps_to_the_last_digit(
    sessions, routing, blocks, block_size, max_num_seqs, mixed, keep_kv, until_s, times
) -> None:
    sessions = sorted(sessions, key=lambda session: session.arrival_s)
    limits = {
        "kv_blocks": blocks * 16 // block_size, "block_size": block_size, "mixed_steps": mixed,
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 64,
        "reserve_own_output_fraction": 0.0 if mixed else 1.0,
        "reserve_running_output_fraction": 0.0 if mixed else 0.098,
    }  # fmt: skip
    jumped, stepped = (
        run(sessions, Line(*times), limits=limits, routing=routing, replicas=2,
            keep_kv=keep_kv, until_s=until_s, step_by_step=step_by_step)
        for step_by_step in (False, True)
    )  # fmt: skip
    assert jumped.turns.tobytes() == stepped.turns.tobytes()
    assert jumped.intervals.counts == stepped.intervals.counts
    assert jumped.now == stepped.now
    assert jumped.refusals == stepped.refusals
    for a, b in zip(jumped.replicas, stepped.replicas, strict=True):
        assert a.scheduler.preemptions == b.scheduler.preemptions
        assert a.scheduler.peak_used == b.scheduler.peak_used
        assert a.kv_cache_usage_mean(jumped.now) == b.kv_cache_usage_mean(stepped.now)
    completed = len(jumped.turns) // len(COLUMNS)
    if until_s is None and not jumped.refused:
        assert completed == jumped.planned
        assert not jumped.in_flight


def test_histogram_equals_single_intervals() -> None:
    run_, single = IntervalHistogram(10**15), IntervalHistogram(10**15)
    run_.add_run(10**13, 3 * 10**10, 4000, 7)
    for step in range(4000):
        single.add_run(10**13 + step * 3 * 10**10, 0, 1, 7)
    assert run_.counts == single.counts
    exact = np.percentile(0.01 + 3e-5 * np.arange(4000), [50, 99])
    assert [run_.percentile_s(p) for p in (50, 99)] == pytest.approx(exact, rel=0.01)
    assert IntervalHistogram(10).percentile_s(50) is None


def answers(name: str, *, slo=(0.5, None), seed=0, changes=None, **load) -> dict:
    config = SimulationConfig(SchedulerConfig(kv_blocks=20_000), **(changes or {}))
    return study(config, Line(context_s=5e-8), Load(workload.load(name), seed=seed, **load), *slo)


def test_same_seed_same_answer() -> None:
    first, again, other = (answers("multi-agent", duration_s=400.0, burst=20, seed=s) for s in (1, 1, 2))
    for result in (first, again, other):
        result.pop("wall_s")
    assert json.dumps(first) == json.dumps(again)
    assert json.dumps(first) != json.dumps(other)
    assert first["completed"] + first["refused"] + first["unfinished"] == first["turns"]


def test_burst_alone_drains_by_rank() -> None:
    result = answers("silent-hour-then-500-calls", burst=300)
    burst = result["burst"]
    assert burst["requests"] == 300
    medians = [row["p50"] for row in burst["ttft_by_rank_s"]]
    assert medians == sorted(medians)
    assert burst["time_to_recover_s"] == pytest.approx(result["ttft_s"]["max"])
    assert 1 <= burst["largest_passing_burst"] < 300
    size = burst["largest_passing_burst"]
    assert answers("silent-hour-then-500-calls", burst=size)["slo_attainment_fraction"] >= 0.95
    assert answers("silent-hour-then-500-calls", burst=size + 1)["slo_attainment_fraction"] < 0.95


def test_longer_pauses_find_less_cached_and_misses_wait_longer() -> None:
    config = SimulationConfig(SchedulerConfig(kv_blocks=4000))
    load = Load(workload.load("simple-chat"), duration_s=6000.0)
    result = study(config, Line(), load, 0.5)
    cached = [row["cached_fraction"] for row in result["prefix_still_cached"] if row["turns"] > 200]
    assert cached == sorted(cached, reverse=True)
    assert cached[0] > cached[-1]
    mixture = result["ttft_mixture"]
    assert mixture["hit"]["mean"] < mixture["miss"]["mean"]
    assert sum(kind["fraction"] for kind in mixture.values()) == pytest.approx(1)


def test_active_and_paused_sessions_follow_littles_law() -> None:
    result = answers("customer-service", duration_s=20_000.0, sessions=2000)
    rate = result["requests_per_s"]
    assert result["sessions"]["active"]["mean"] == pytest.approx(rate * result["e2el_s"]["mean"], rel=0.05)
    assert result["sessions"]["paused"]["mean"] > 5 * result["sessions"]["active"]["mean"]


def kit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from kit.cli import main; main()", "simulate", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


BASE = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb")
KEYS = {
    "ttft_s", "tpot_s", "itl_s", "e2el_s", "output_tokens_per_s", "requests_per_s", "intervals",
    "limited_by", "warnings", "completed", "refused", "unfinished", "turns", "prefix_hit_fraction",
    "preemptions", "kv_cache_usage", "slo_attainment_fraction", "burst", "simulated_s", "wall_s",
}  # fmt: skip


def test_command_prints_one_object_with_every_key() -> None:
    done = kit(*BASE, "--workload", "coding-agent", "--sessions", "3", "--json", "--replicas", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= KEYS
    assert {"mean", "p50", "p90", "p99"} <= set(result["ttft_s"])
    assert {"time_to_recover_s", "largest_passing_burst", "backlog_request_s"} <= set(result["burst"])
    assert isinstance(result["warnings"], list)
    for quantity, (low, high) in result["intervals"].items():
        name, _, part = quantity.rpartition("_")
        point = result[name][part] if part in ("mean", "p50") else result[quantity]
        assert low < point <= high < 10 * low


def test_no_more_tokens_than_came_are_within_the_interval() -> None:
    basis = fitted(
        *(args := (catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb"))), resolve(EngineConfig(), *args)
    )
    limits, steps, _ = replica(*args, EngineConfig(), basis)
    cluster = SimulationConfig(limits, request_s=steps.request_s)
    alone = [Session(0, 0.0, [Turn(500, 100)])]
    spread = [Session(key, 10.0 * key, [Turn(500, 100)]) for key in range(101)]
    one, many = (study(cluster, steps, Recorded(load), basis=basis) for load in (alone, spread))
    assert one["intervals"]["output_tokens_per_s"][1] > 1.1 * one["output_tokens_per_s"]
    assert many["intervals"]["output_tokens_per_s"][1] == pytest.approx(101 * 100 / 1000.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give --workload or --trace"),
        (("--workload", "voice", "--sessions", "0"), "--sessions must be above 0"),
        (("--workload", "voice", "--duration", "-5"), "--duration must be above 0, got -5"),
        (("--workload", "voice", "--duration", "inf"), "--duration must be above 0, got inf"),
        (("--workload", "voice", "--seed", "-1"), "--seed must be above -1, got -1"),
        (("--workload", "voise"), "nearest: voice"),
        (("--workload", "voice", "--gpu", "t4-16gb"), "llama-3.1-8b leaves no room for a KV cache on 1 x t4-16gb"),
        (("--workload", "voice", "--routing", "random"), "unknown routing 'random'"),
        (("--trace", "x"), "--trace needs --trace-format: azure"),
        (("--trace", "nowhere.csv", "--trace-format", "azure"), "no such trace file: nowhere.csv"),
        (("--workload", "voice", "--max-num-seqs", "x"), "max-num-seqs"),
    ],
)
def test_command_refuses_bad_input_in_a_line(arguments: tuple, text: str) -> None:
    done = kit(*BASE, *arguments, "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_command_names_a_negative_pause(tmp_path: Path) -> None:
    content = yaml.safe_load((workload.FOLDER / "voice.yaml").read_text())
    content["session"]["pauses"][1]["seconds"] = {"constant": -1}
    file = tmp_path / "w.yaml"
    file.write_text(yaml.safe_dump(content))
    done = kit(*BASE, "--workload", str(file), "--json")
    assert done.returncode == 2
    assert "w.yaml: session.pauses.1.seconds" in done.stderr


def test_mooncake_trace_is_played_whole() -> None:
    path = SHARED / "traces" / "mooncake" / "conversation_trace.jsonl"
    if not path.is_file():
        pytest.skip(f"no Mooncake trace at {path}")
    done = kit(*BASE, "--trace", str(path), "--trace-format", "mooncake", "--replicas", "8", "--json")
    result = json.loads(done.stdout)
    assert (result["completed"], result["unfinished"]) == (12_031, 0)
    assert 0.04 < result["prefix_hit_fraction"] < 0.366
