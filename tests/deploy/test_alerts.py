"""Every alert fires, stays silent and resolves: promtool plays alerts.yaml on the rules of both engines."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from kit.deploy import watch
from kit.engine_config import engine_data

TABLE = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())
ENGINES = ("vllm", "sglang")
NOT_PRINTED = {"sglang": {"CapacityWait"}}  # SGLang does not tell why requests wait
CIRCUIT = "vllm_router_cb_state"
GOOD, BAD = 20, 120  # samples of 15 s before and during the fault
pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed"),
]


def watched(engine: str) -> dict:
    replica = {"address": "a:8000", "tier": "warm", "gpu": "h100"}
    targets = {
        "engine": [replica, {**replica, "address": "burst:8000", "tier": "burst"}],
        "edge": [replica],
        "gpu": [replica],
    }
    return watch.context(
        engine, str(engine_data(engine)["newest"]), targets, {"ttft_s": 0.5, "tpot_s": 0.05}, gpus=1,
        usd_per_hour={"warm": 2.5, "burst": 0.9}, budget_usd=5000, kubernetes=True,
        router={"circuit": CIRCUIT, "address": "router:29000"},
    )  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES)
def rules(request, tmp_path_factory, render_monitoring) -> tuple[str, dict, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    given = watched(request.param)
    render_monitoring(folder, given)
    return request.param, given, folder / "rules"


def alerts_of(folder: Path) -> dict[str, dict]:
    groups = yaml.safe_load((folder / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def spelled(key: str, given: dict) -> str:
    """A key of the table as a series that would be scraped."""
    key, _, replica = key.partition("@")
    quantity, *part = key.split("/")
    if quantity not in (*watch.QUANTITIES, "up"):
        return key.replace("CIRCUIT", CIRCUIT)
    name, _, chosen = ("up" if quantity == "up" else given[quantity]).partition("{")
    labels = {"instance": f"{replica or 'a'}:8000", "tier": "burst" if replica == "burst" else "warm", "job": "engine"}
    if quantity != "up":
        labels["model_name"] = "m"
    labels |= {label: value.replace(".", "0") for label, value in re.findall(r'(\w+)=~?"([^"]*)"', chosen)}
    if part[1:]:
        labels["le"] = given["ttft_edge"] if part[1] == "EDGE" else part[1]
    shown = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{'_' * bool(part)}{part[0] if part else ''}{{{shown}}}"


def values(good: object, bad: object) -> str:
    """Three phases in promtool's notation."""
    parts = []
    for value, samples in ((good, GOOD), (bad, BAD), (good, 80)):
        grown = isinstance(value, str) and value.startswith("+")
        parts.append(f"0{value}x{samples - 1}" if grown else f"{value}x{samples - (value != '_')}")
    return " ".join(parts)


def promtool(rules: Path, tests: list[dict], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "test.yml"
    names = [str(rules / name) for name in ("recording.yml", "alerts.yml")]
    file.write_text(yaml.safe_dump({"rule_files": names, "evaluation_interval": "30s", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)


def played(name: str, record: dict, given: dict) -> dict:
    """One alert's test: how many of it fire at each time."""
    times = TABLE["defaults"] | record
    wanted = [(time, 0) for time in times["silent"]] + [(times["fires"], 1), (times["resolved"], 0)]
    query = f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)'
    series = [{"series": spelled(key, given), "values": values(*pair)} for key, pair in record["series"].items()]
    asked = [{"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": n}]} for at, n in wanted]
    return {"name": name, "interval": "15s", "input_series": series, "promql_expr_test": asked}


def test_every_alert_has_its_test(rules):
    engine, _, folder = rules
    assert set(alerts_of(folder)) == set(TABLE["alerts"]) - NOT_PRINTED.get(engine, set())
    assert len(TABLE["alerts"]) >= 22


def test_every_alert_says_how_urgent_it_is_and_what_to_do(rules):
    for rule in alerts_of(rules[2]).values():
        assert rule["labels"]["severity"] in ("page", "scale", "warn", "cost", "info")
        assert {"summary", "action"} == set(rule["annotations"])


@pytest.fixture(scope="module")
def outcome(rules, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """All alerts of an engine in one run of promtool; what failed is told by its query."""
    engine, given, folder = rules
    named = {name: record for name, record in TABLE["alerts"].items() if name not in NOT_PRINTED.get(engine, ())}
    tests = [played(name, record, given) for name, record in named.items()]
    return promtool(folder, tests, tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize("name", TABLE["alerts"])
def test_alert_stays_silent_fires_and_resolves(rules, outcome, name):
    if name in NOT_PRINTED.get(rules[0], ()):
        pytest.skip(f"{rules[0]} does not print what {name} reads")
    told = outcome.stdout + outcome.stderr
    assert f'alertname=\\"{name}\\"' not in told, told
    assert outcome.returncode == 0 or "alertname" in told, told


def test_the_test_sees_an_alert_that_does_not_fire(rules, tmp_path):
    _, given, folder = rules
    outcome = promtool(
        folder, [played("QueueBacklog", {"series": {"waiting": [5, 5], "running": [8, 8]}}, given)], tmp_path
    )
    assert outcome.returncode == 1
    assert 'alertname=\\"QueueBacklog\\"' in outcome.stdout + outcome.stderr


def test_nothing_fires_while_all_is_well(rules, tmp_path):
    engine, given, folder = rules
    series = {}
    for name, record in TABLE["alerts"].items():
        for key, (good, _) in record["series"].items() if name not in NOT_PRINTED.get(engine, ()) else ():
            series.setdefault(spelled(key, given), values(good, good))
    asked = [
        {"expr": 'ALERTS{alertstate="firing"}', "eval_time": at, "exp_samples": []} for at in ("10m", "30m", "50m")
    ]
    test = {"interval": "15s", "promql_expr_test": asked}
    test["input_series"] = [{"series": name, "values": text} for name, text in series.items()]
    outcome = promtool(folder, [test], tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
