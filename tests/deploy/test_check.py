"""kit deploy check finds what is wrong: each fault is put into a bundle by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.catalog.paths import DATA
from kit.deploy import Source, render
from kit.deploy.check import FAILED, OPEN, PASSED, check
from kit.deploy.queries import metrics_in
from kit.scenario import load

KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
REFERENCES = sorted(path.parent for path in (DATA.parent / "docker").glob("*/bundle.json"))
FAULTS = [  # file, what is there, what it becomes, the check that sees it
    (
        "monitoring/rules/recording.yml",
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "metric names and labels",
    ),
    ("monitoring/rules/recording.yml", 'finished_reason="abort"', 'reason="abort"', "metric names and labels"),
    ("monitoring/rules/alerts.yml", "model:kv_cache_usage:avg", "model:kv_usage:avg", "metric names and labels"),
    (
        "monitoring/grafana/dashboards/gpus.json",
        "DCGM_FI_DEV_POWER_USAGE",
        "DCGM_FI_PROF_SM_ACTIVE",
        "metric names and labels",
    ),
    ("compose.yaml", "image: prom/prometheus:v", "image: prom/prometheus:latest # v", "images pinned"),
    ("compose.yaml", "read_only: true", "read_only: false", "compose.yaml: containers locked down"),
    ("compose.yaml", "cap_drop: [ALL]", "cap_drop: []", "compose.yaml: containers locked down"),
    ("edge/servers-engines.conf", "server ", "# api_key: 0123456789abcdef0123456789abcdef\nserver ", "secrets"),
    ("values.yaml", "pools:", "# hf_abcdefghijklmnopqrstuvwxyz0123\npools:", "secrets"),
]
TOOLS = [
    ("edge/nginx.conf", "proxy_buffering off;", "proxy_buffering maybe;", "edge: nginx -t", "nginx"),
    ("edge/nginx.conf", "server_tokens off;", "server_tokens on;", "edge: gixy", "gixy"),
    ("edge/watch.sh", "while :; do", "while :; do do", "shell syntax: watch.sh", "sh"),
    ("monitoring/rules/alerts.yml", "sum(up{", "sum((up{", "Prometheus and its rules", "promtool"),
    ("monitoring/alertmanager.yml", "receiver: now", "receiver: nobody", "Alertmanager", "amtool"),
    (
        "monitoring/grafana/dashboards/agents.json",
        "model:ttft_seconds:p50",
        "rate(model:a:b)",
        "dashboards",
        "promtool",
    ),
]

CUSTOM = [  # file, what is there, what it becomes, the object that is refused
    ("scale.yaml", "maxReplicaCount", "maxReplicas", "ScaledObject engine"),
    ("scale.yaml", 'threshold: "5"', "threshold: 5", "ScaledObject engine"),
    ("scale.yaml", "keda.sh/v1alpha1", "keda.sh/v1", "ScaledObject engine"),
    ("engine.yaml", "restartPolicy: RecreateGroupOnPodRestart", "restartPolicy: Always", "LeaderWorkerSet engine"),
    ("monitoring.yaml", "interval: 5s", "interval: 5", "PodMonitor engine"),
    ("monitoring.yaml", "record: engine:requests_running", "rule: engine:requests_running", "PrometheusRule recording"),
]
PODS = [("engine.yaml", "tolerations:", "toleration:", "LeaderWorkerSet engine: its pods")]
PODS += [("edge.yaml", "replicas:", "replica:", "Deployment edge")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    render(Source(load("api-cluster"), "h200-sxm-141gb"), "multi-node", folder, target="kubernetes")
    return folder


def changed(cluster: Path, folder: Path, name: str, before: str, after: str) -> dict[str, str]:
    shutil.copytree(cluster, folder)
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))
    return found(folder, "kubernetes")


@pytest.mark.parametrize(("name", "before", "after", "seen_by"), CUSTOM)
def test_a_custom_resource_that_leaves_its_definition_is_refused(cluster, tmp_path, name, before, after, seen_by):
    where = f"Kubernetes schema: {name}: {seen_by}"
    assert found(cluster, "kubernetes")[where] == PASSED
    assert changed(cluster, tmp_path / "bundle", name, before, after)[where] == FAILED


@pytest.mark.deploy
@pytest.mark.parametrize(("name", "before", "after", "seen_by"), PODS)
def test_a_field_that_kubernetes_does_not_know_is_refused(cluster, tmp_path, name, before, after, seen_by):
    where = f"Kubernetes schema: {name}: {seen_by}"
    if found(cluster, "kubernetes")[where] == OPEN:
        pytest.skip("kubernetes-validate: make deploy-tools")
    assert changed(cluster, tmp_path / "bundle", name, before, after)[where] == FAILED


@pytest.mark.deploy
def test_a_kind_without_a_schema_is_said_to_be_open(cluster, tmp_path):
    shutil.copytree(cluster, tmp_path / "bundle")
    (tmp_path / "bundle" / "own.yaml").write_text("{apiVersion: example.com/v1, kind: Other, metadata: {name: one}}")
    assert found(tmp_path / "bundle", "kubernetes")["Kubernetes schema: own.yaml: Other one"] == OPEN


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    render(Source(load("burst-10000"), "h100-sxm-80gb"), "single-node", folder)
    return folder


def found(folder: Path, *parts: str) -> dict[str, str]:
    return {one.check: one.status for one in check(folder, parts)}


@pytest.fixture
def broken(whole, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(whole, folder)

    def change(name: str, before: str, after: str) -> Path:
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))
        return folder

    return change


@pytest.mark.deploy
@pytest.mark.parametrize("folder", REFERENCES, ids=lambda path: path.name)
def test_the_reference_bundles_pass(folder):
    findings = check(folder)
    assert {one.check: one.reason for one in findings if one.status == FAILED} == {}
    assert sum(one.status == PASSED for one in findings) >= 3
    assert any(one.status == OPEN for one in findings)


@pytest.mark.parametrize("engine", ["sglang", "tgi", "tensorrt-llm"])
def test_other_engines_bundles_name_only_what_they_print(engine, tmp_path):
    render(Source(load("burst-10000"), "h100-sxm-80gb", engine), "single-node", tmp_path)
    assert found(tmp_path, "metrics")["metric names and labels"] == PASSED


@pytest.mark.parametrize(("name", "before", "after", "seen_by"), FAULTS)
def test_a_fault_is_found(broken, name, before, after, seen_by):
    part = next(part for part in ("metrics", "images", "compose", "secrets") if seen_by.startswith((part[:6], part)))
    findings = {one.check: one for one in check(broken(name, before, after), [part])}
    assert findings[seen_by].status == FAILED
    assert Path(name).name.split(".")[0] in findings[seen_by].reason or seen_by.startswith("compose")


@pytest.mark.deploy
@pytest.mark.parametrize(("name", "before", "after", "seen_by", "tool"), TOOLS)
def test_a_fault_is_found_by_its_tool_or_said_to_be_open(broken, name, before, after, seen_by, tool):
    statuses = {
        check: status for check, status in found(broken(name, before, after)).items() if check.startswith(seen_by)
    }
    assert statuses
    assert set(statuses.values()) in ({FAILED}, {OPEN})
    if shutil.which(tool):
        assert FAILED in statuses.values()


def test_a_missing_file_and_an_open_folder_of_secrets_are_found(whole, broken):
    folder = broken("values.yaml", "pools:", "pools:")
    (folder / "edge" / "drain.sh").unlink()
    (folder / "secrets").mkdir(mode=0o755)
    statuses = found(folder, "files", "secrets")
    assert (statuses["files"], statuses["secrets"]) == (FAILED, FAILED)


def test_metrics_are_found_in_queries_and_functions_are_not():
    query = 'quantile(0.95, sum by (le) (rate(a:b_bucket{le="0.5",x=~"y.*"}[5m]))) > 2 and on () c offset 5m'
    assert metrics_in(query) == {"a:b_bucket": {"le", "x"}, "c": set()}


def test_the_command_exits_1_where_something_failed_and_prints_json(broken):
    folder = broken("compose.yaml", "read_only: true", "read_only: false")
    done = subprocess.run([*KIT, "deploy", "check", str(folder), "--json"], capture_output=True, text=True)
    told = json.loads(done.stdout)["findings"]
    assert done.returncode == 1
    assert [one["check"] for one in told if one["status"] == FAILED] == ["compose.yaml: containers locked down"]


def test_a_folder_without_a_bundle_is_refused(tmp_path):
    done = subprocess.run([*KIT, "deploy", "check", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
