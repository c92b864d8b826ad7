"""What the turns of a simulation say, on sessions small enough to count by hand, and the notebook that shows it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit import run, scenario, workload
from kit.scheduler import SchedulerConfig
from kit.simulator import Load, Simulation, SimulationConfig, turns
from kit.simulator.answers import answers
from kit.workload import Session, Turn

CONFIG = SimulationConfig(SchedulerConfig(kv_blocks=10_000))


class Second:
    """Every step takes a second, so an answer of n tokens takes n seconds on an idle engine."""

    def step_s(self, chunks, decodes, context):
        return 1.0

    def decode_line(self, decodes):
        return 1.0, 0.0


def play(*sessions: Session, until_s: float | None = None) -> tuple[Simulation, pd.DataFrame]:
    sim = Simulation(replace(CONFIG, until_s=until_s), Second()).run(sessions)
    return sim, turns.table(sim)


def two_calls(pause_s: float, **more) -> Session:
    return Session(0, 0.0, [Turn(100, 2, pause_s, "tool", **more), Turn(50, 2)])


def test_kept_counts_what_a_pause_leaves():
    _, frame = play(two_calls(30.0))
    assert frame["input_len"].tolist() == [100, 152]
    # prompts 252 tokens, of which 102 were there before; active 2 s x 100 + 2 s x 152
    assert turns.kept(frame, 29.0) == (0.0, pytest.approx(29 * 102 / 504))
    assert turns.kept(frame, 30.0) == (pytest.approx(102 / 252), pytest.approx(30 * 102 / 504))
    assert turns.kept(frame, 1e9) == turns.kept(frame, 30.0)


@pytest.mark.parametrize(("until_s", "end_s"), [(None, 32.0), (20.0, 20.0)])
def test_a_pause_that_the_end_cuts_short_is_one(until_s, end_s):
    sim, frame = play(two_calls(30.0), until_s=until_s)
    spans = turns.pauses(sim, frame)
    assert spans.to_numpy().tolist() == [[2.0, end_s, 102.0]]
    assert turns.level(spans, [1.0, 3.0, 19.0, 33.0], spans["tokens"]).tolist() == [0.0, 102.0, 102.0, 0.0]


def test_a_refused_session_does_not_pause():
    short = replace(CONFIG, scheduler=SchedulerConfig(kv_blocks=10_000, max_model_len=120), until_s=50.0)
    sim = Simulation(short, Second()).run([two_calls(30.0)])
    assert len(sim.refused) == 1
    assert turns.pauses(sim, turns.table(sim)).empty


def test_a_parent_waits_for_the_slowest_of_its_children():
    children = [Session(0, 0.0, [Turn(10, n)], prefix_id=1) for n in (5, 9, 20)]
    _, frame = play(two_calls(0.0, children=children))
    (row,) = turns.fan_outs(frame)
    assert (row["sub-agents"], row["times"]) == (3, 1)
    assert row["slowest s"] == pytest.approx(20)
    assert row["mean worker s"] == pytest.approx(34 / 3)


def test_poisson_calls_have_dispersion_one_and_a_wave_does_not():
    rng = np.random.default_rng(0)
    even = rng.random(20_000) * 10_000
    assert turns.dispersion(even, 10.0) == pytest.approx(1, abs=0.1)
    together = np.floor(even / 100) * 100
    assert turns.dispersion(together, 10.0) > 50
    (row,) = turns.bursts({"x": together})
    assert row["silent"] == "99%"


@pytest.mark.parametrize(
    ("key", "expected"), [("single-agent", 1), ("multi-agent", 2), ("api-cluster", 3), ("reasoning", 4)]
)
def test_the_articles_own_scenarios_have_their_patterns(key, expected):
    case = scenario.load(key)
    drawn = list(workload.generate(workload.load(case.workload), 0, sessions=200))
    number, rule = turns.pattern(drawn, models=len(case.models), active=case.sessions)
    assert number == expected
    assert number == next((row["pattern"] for row in rule if row["met"]), 1)


def test_sub_agents_alone_make_pattern_two():
    drawn = list(workload.generate(workload.load("multi-agent"), 0, sessions=100))
    assert turns.pattern(drawn, models=0, active=1)[0] == 2


def test_growth_and_bodies_of_the_same_session():
    session = two_calls(30.0)
    _, frame = play(session)
    first, second = turns.growth(frame)
    assert (first["tokens sent"], first["new"]) == (100, 100)
    assert (second["tokens sent"], second["sent before"], second["new"]) == (152, 102, 50)
    medians = {row["quantity"]: row["p50"] for row in turns.bodies([session])}
    assert medians == {
        "calls of a session": 2, "prompt of the first call": 100, "new tokens of a later call": 50,
        "output tokens of a call": 2, "pause for tool, s": 30,
    }  # fmt: skip


def test_survival_and_mixture_tell_what_answers_found():
    sim, _ = play(two_calls(30.0))
    result = answers(sim, None, None, set())
    row = next(row for row in turns.survival({"pool": result}) if row["turns"])
    assert (row["pause s"], row["pool"]) == ("10 to 60", "100%")
    assert [row["turn"] for row in turns.mixture({"pool": result})] == ["first", "hit"]


def test_the_passing_burst_is_what_the_limit_leaves_time_for():
    body = workload.load("simple-chat").session.model_copy(update={"turns": workload.Distribution(constant=1)})
    load = Load(workload.load("simple-chat").model_copy(update={"session": body}))
    one_a_step = replace(CONFIG, scheduler=SchedulerConfig(kv_blocks=10_000, max_num_seqs=1))
    # one call at a time, each of several seconds: only the first has its token within 1.5 s
    assert turns.passing_burst(one_a_step, Second(), load, 1.5) == 1
    assert turns.passing_burst(CONFIG, Second(), load, 1.5) > 1


def test_notebook_01_reads_the_gpus_of_00(tmp_path):
    chosen = run.select(["00", "01"])
    rows, _ = run.walkthrough(chosen, tmp_path, run.preset("rtx-4090-24gb"), {"workload": "reasoning"})
    assert [row["error"] for row in rows] == [None, None]
    first, second = (json.loads(Path(row["results"]).read_text(encoding="utf-8")) for row in rows)
    count = first["results"]["recommended"]["gpu_count"]
    assert f"on {count}x rtx-4090-24gb" in second["decision"][2]
    found = second["results"]
    assert (found["workload"], found["pattern"], found["counts"]) == ("reasoning", 4, "sessions")
    assert found["burst"]["largest_passing_cold"] <= found["burst"]["largest_passing_warm"]
    assert found["paused_sessions_max"] > found["active_sessions_max"]
