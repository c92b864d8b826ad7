"""Arrivals, session bodies, presets, and how a broken workload file is refused."""

import os
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
import yaml

from kit import scenario, workload
from kit.errors import UserError
from kit.traces import read
from kit.workload.arrivals import Burst, Diurnal, Mmpp, Renewal
from kit.workload.body import Body
from kit.workload.distribution import Distribution

SHARED = Path(os.environ.get("KIT_SHARED", Path(__file__).parents[2] / "shared"))
AZURE = SHARED / "traces" / "azure" / "AzureLLMInferenceTrace_code.csv"


def times(process, until_s: float, seed: int = 0) -> np.ndarray:
    return np.array(list(takewhile(lambda t: t < until_s, process.times(np.random.default_rng(seed)))))


def dispersion(arrivals: np.ndarray, window_s: float) -> float:
    """Variance over mean of the counts in windows."""
    windows = int(arrivals.max() // window_s)
    counts = np.bincount((arrivals // window_s).astype(int), minlength=windows)[:windows]
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize(("kind", "cv"), [("constant", 0.0), ("poisson", 1.0), ("gamma", 3.0)])
def test_renewal_rate_and_variation(kind: str, cv: float) -> None:
    extra = {"cv": cv} if kind == "gamma" else {}
    gaps = np.diff(times(Renewal(kind=kind, rate_per_s=2.0, **extra), 20_000))
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08, abs=1e-9)


def test_off_state_is_exactly_silent() -> None:
    states = [{"rate_per_s": 50, "hold_s": 10}, {"rate_per_s": 0, "hold_s": 90}]
    process = Mmpp(kind="on_off", states=states)
    arrivals = times(process, 100_000)
    assert ((arrivals % 100) <= 10).all()
    assert len(arrivals) / 100_000 == pytest.approx(process.mean_rate_per_s(), rel=0.02)


def test_mmpp_long_run_rate_follows_the_transitions() -> None:
    process = workload.load("azure-code-on-off").arrivals
    assert isinstance(process, Mmpp)
    assert len(times(process, 400_000)) / 400_000 == pytest.approx(process.mean_rate_per_s(), rel=0.03)


def test_diurnal_peak_over_mean() -> None:
    process = Diurnal(kind="diurnal", rate_per_s=1.0, peak_to_mean=10, peak_at_s=50_400)
    counts, _ = np.histogram(times(process, 864_000) % 86_400, bins=144, range=(0, 86_400))
    assert counts.sum() / 864_000 == pytest.approx(1.0, rel=0.02)
    assert counts.max() / counts.mean() == pytest.approx(10, rel=0.08)
    assert 84 - 6 <= counts.argmax() <= 84 + 6


def test_step_and_batch() -> None:
    assert times(Burst(kind="step", size=3, at_s=5), 100).tolist() == [5, 5, 5]
    batch = Burst(kind="batch", size=2, at_s=1, over_s=1, every_s=10)
    assert times(batch, 20).tolist() == [1, 1.5, 11, 11.5]


def test_sessions_within_a_duration_are_as_many_as_asked() -> None:
    for name in ("simple-chat", "customer-service", "azure-code-on-off", "deep-research"):
        found = list(workload.generate(workload.load(name), 3, sessions=400, duration_s=4000))
        assert 300 < len(found) <= 400, name
        assert all(0 <= s.arrival_s < 4000 for s in found)


def test_azure_code_fit_reproduces_the_index_of_dispersion() -> None:
    if not AZURE.is_file():
        pytest.skip(f"no azure code trace at {AZURE}")
    recorded = np.array([call.arrival_s for call in read(str(AZURE), "azure").calls])
    fitted = times(workload.load("azure-code-on-off").arrivals, 400_000)
    for window_s in (1.0, 60.0):
        assert dispersion(fitted, window_s) == pytest.approx(dispersion(recorded, window_s), rel=0.2)


@pytest.mark.parametrize("name", workload.names())
def test_presets_load_and_repeat_for_a_seed(name: str) -> None:
    preset = workload.load(name)
    assert preset.sources
    first = list(islice(workload.generate(preset, 7, sessions=30), 30))
    assert first == list(islice(workload.generate(preset, 7, sessions=30), 30))
    other = list(islice(workload.generate(preset, 8, sessions=30), 30))
    assert first != other or name in ("agents", "burst-10000")  # nothing is drawn
    assert [s.arrival_s for s in first] == sorted(s.arrival_s for s in first)
    for session in first:
        assert session.turns[-1].pause_kind == ""
        assert all(t.new_tokens >= 1 and t.output_len >= 1 for t in session.turns)
        assert all(t.pause_after_s >= 0 for t in session.turns)


def test_silent_hour_has_500_in_a_minute() -> None:
    for name, counts in (("silent-hour-then-500", "sessions"), ("silent-hour-then-500-calls", "calls")):
        preset = workload.load(name)
        arrivals = times(preset.arrivals, 7000)
        assert preset.counts == counts
        assert len(arrivals) == 500
        assert arrivals.min() >= 3600
        assert arrivals.max() < 3660


def body(**changes) -> Body:
    fields = {"turns": 20, "first_new_tokens": 1000, "new_tokens": 100, "output_len": 50}
    return Body.model_validate(fields | changes)


def test_context_grows_until_it_is_compacted() -> None:
    draw = body(shared_prefix={"tokens": 500},
                compaction={"above_tokens": 2000, "to_tokens": 200}).draw  # fmt: skip
    session = draw(np.random.default_rng(0), 0, 0.0)
    lengths = session.input_lens()
    assert lengths[:5] == [1500, 1650, 1800, 1950, 800]  # 2,100 would be above: 500 + 200 + 100
    assert session.turns[4].compact_to == 200
    assert max(lengths) <= 2000


def test_pauses_by_class_with_a_pareto_tail() -> None:
    tail = {"median": 1, "sigma": 0.5, "tail_fraction": 0.1, "tail_from": 60, "tail_index": 1.1,
            "max": 3600}  # fmt: skip
    pauses = [{"kind": "human", "weight": 1, "seconds": 100},
              {"kind": "shell", "weight": 3, "seconds": tail}]  # fmt: skip
    session = body(turns=20_001, pauses=pauses).draw(np.random.default_rng(1), 0, 0.0)
    shell = np.array([t.pause_after_s for t in session.turns if t.pause_kind == "shell"])
    assert len(shell) / 20_000 == pytest.approx(0.75, abs=0.02)
    assert (shell >= 60).mean() == pytest.approx(0.1, abs=0.01)
    assert np.median(shell[shell < 60]) == pytest.approx(1.0, rel=0.05)
    assert shell.max() <= 3600
    assert (shell >= 600).sum() / (shell >= 60).sum() == pytest.approx(10**-1.1, abs=0.03)


def test_subagents_start_after_a_turn_and_never_after_the_last() -> None:
    inner = {"turns": 2, "first_new_tokens": 10, "new_tokens": 5, "output_len": 5}
    session = body(turns=4, subagents={"probability": 1, "agents": 3, "session": inner}).draw(
        np.random.default_rng(0), 0, 0.0
    )
    assert [len(turn.children) for turn in session.turns] == [3, 3, 3, 0]
    assert session.turns[0].children[0].prefix_id != session.prefix_id


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"session": {"pauses": [{"kind": "shell", "seconds": -3}]}}, r"session.pauses.0.seconds.*-3"),
        ({"session": {"output_len": {"median": 5, "mean": 5}}}, "session.output_len.*give one of"),
        ({"session": {"turns": {"median": 5, "sigmma": 1}}}, "session.turns.sigmma"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": 0}}, "arrivals.*rate_per_s"),
        ({"arrivals": {"kind": "on_off", "states": [{"rate_per_s": 1, "hold_s": 1}]}}, "arrivals.*two states"),
        ({"arrivals": {"kind": "poison"}}, "arrivals.*poison"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": float("nan")}}, "arrivals.*rate_per_s"),
        ({"sources": []}, "sources"),
    ],
)
def test_a_broken_file_is_refused_with_file_and_field(tmp_path, changes: dict, text: str) -> None:
    content = yaml.safe_load((workload.FOLDER / "simple-chat.yaml").read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if key == "session" else value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"mine.yaml: {text}"):
        workload.load(str(file))


def test_unknown_names_and_broken_yaml(tmp_path) -> None:
    with pytest.raises(UserError, match="unknown workload 'codingagent'; nearest: coding-agent"):
        workload.load("codingagent")
    (tmp_path / "x.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"x.yaml: not YAML"):
        workload.load(str(tmp_path / "x.yaml"))
    with pytest.raises(UserError, match="arrivals never end"):
        next(workload.generate(workload.load("voice"), 0))


def test_distribution_kinds() -> None:
    rng = np.random.default_rng(0)
    assert Distribution(mean=3).sample(rng, 100_000).mean() == pytest.approx(3, rel=0.02)
    assert Distribution(median=3, sigma=1).average() == pytest.approx(3 * np.exp(0.5), rel=0.03)
    assert set(Distribution(constant=0.2).tokens(rng, 3)) == {1}


def test_scenarios_name_presets_that_exist() -> None:
    files = sorted((workload.FOLDER.parent / "scenarios").glob("*.yaml"))
    named = {yaml.safe_load(file.read_text())["workload"] for file in files}
    assert named <= set(workload.names())


def whole(session: workload.Session) -> list[int]:
    """Tokens at the end of every turn, sub-agents' ones too."""
    own = [prompt + turn.output_len for prompt, turn in zip(session.input_lens(), session.turns, strict=True)]
    return own + [tokens for turn in session.turns for child in turn.children for tokens in whole(child)]


def test_the_engines_of_many_agents_take_all_their_turns() -> None:
    case = scenario.load("multi-agent")
    longest = [max(whole(session)) for session in workload.generate(workload.load(case.workload), 4, sessions=300)]
    assert 3000 < max(longest) <= min(role.context_tokens for role in case.models)
