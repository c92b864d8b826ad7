"""kit deploy: what a bundle holds, that it repeats itself byte for byte, and that a user's values last."""

import json
import re
import subprocess
import sys
import zlib
from bisect import bisect_left
from pathlib import Path

import pytest
import yaml

from kit.catalog.paths import DATA, load_yaml
from kit.deploy import Source, render
from kit.engine_config import engine_data
from kit.errors import UserError
from kit.scenario import load

DOCKER = DATA.parent / "docker"
DATA_DEPLOY = load_yaml(DATA / "deploy.yaml")
H100 = "h100-pcie-80gb"
REFERENCES = DATA_DEPLOY["references"]


def made(folder: Path, architecture: str = "single-node", scenario: str = "customer-service", **how) -> Path:
    target = how.pop("target", None)
    render(Source(load(scenario), how.pop("gpu", H100), **how), architecture, folder, target)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def edited(folder: Path, **pools) -> None:
    values = yaml.safe_load((folder / "values.yaml").read_text())
    for name, changes in pools.items():
        for key, value in changes.items():
            old = values["pools"][name][key]
            values["pools"][name][key] = old | value if isinstance(value, dict) else value
    (folder / "values.yaml").write_text(yaml.safe_dump(values))


def compose(folder: Path) -> dict:
    return yaml.safe_load((folder / "compose.yaml").read_text())


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_bundles_are_fresh_renders(name, tmp_path):
    how = REFERENCES[name]
    made(tmp_path / "a", how["architecture"], how["scenario"], gpu=how["gpu"], target=how.get("target"))
    fresh, stored = files(tmp_path / "a"), files(DOCKER / name)
    assert fresh.keys() == stored.keys()
    assert [path for path in fresh if fresh[path] != stored[path]] == [], "make bundles"


def test_values_are_kept_and_used(tmp_path):
    made(tmp_path)
    before = files(tmp_path)
    edited(tmp_path, main={"replicas": 3, "flags": {"max_num_seqs": 77}})
    (tmp_path / "compose.yaml").write_text("services: {}\n")
    own = (tmp_path / "values.yaml").read_text()
    made(tmp_path)
    after = files(tmp_path)
    assert after["values.yaml"] == own
    assert [name for name in compose(tmp_path)["services"] if name.startswith("engine")] == [
        "engine-0",
        "engine-1",
        "engine-2",
    ]
    command = compose(tmp_path)["services"]["engine-2"]["command"]
    assert command[command.index("--max-num-seqs") + 1] == "77"
    assert after["monitoring/alertmanager.yml"] == before["monitoring/alertmanager.yml"]
    made(tmp_path)
    assert files(tmp_path) == after


def test_untouched_values_follow_the_scenario(tmp_path):
    made(tmp_path)
    made(tmp_path, scenario="simple-qa")
    assert "mistral-7b-v0.3" in (tmp_path / "values.yaml").read_text()


def test_a_value_may_be_given_alone(tmp_path):
    (tmp_path / "values.yaml").write_text("edge: {port: 9001}\n")
    made(tmp_path)
    assert compose(tmp_path)["services"]["edge"]["ports"] == ["127.0.0.1:9001:9001"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("edge: {prot: 1}", "prot"),
        ("pools: 3", "a mapping"),
        ("- 1", "mapping"),
        ("edge: {balance: random}", "consistent-hash"),
        ("pools: {main: {gpu: h1000}}", "h1000"),
        ("pools: {main: {flags: {max_nun_seqs: 3}}}", "max_nun_seqs"),
        ("pools: {main: {replicas: two}}", "a number"),
        ("pools: {main: {replicas: 0}}", "above 0"),
        ("pools: {main: {replicas: 9}}", "9 GPUs on one host"),
        ("pools: {main: {replicas_per_gpu: 2}}", "at most 0.49"),
    ],
)
def test_wrong_values_are_named(tmp_path, text, told):
    (tmp_path / "values.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        made(tmp_path)


def test_another_architecture_leaves_nothing_behind(tmp_path):
    made(tmp_path, "tiered")
    made(tmp_path, "burst", "voice-agent", target="dstack")
    assert files(tmp_path).keys() == {"README.md", "bundle.json", "service.dstack.yml", "values.yaml"}


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        made(tmp_path)


@pytest.mark.parametrize("name", REFERENCES)
def test_readme_is_a_page(name):
    lines = (DOCKER / name / "README.md").read_text().splitlines()
    assert 10 < len(lines) <= 70
    assert not [line for line in lines if "[[" in line or "[%" in line]


@pytest.mark.parametrize("name", ["single-node", "burst", "tiered"])
def test_only_loopback_is_published_and_engines_have_no_way_out(name):
    found = compose(DOCKER / name)
    ports = [port for one in found["services"].values() for port in one.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert found["networks"]["serving"]["internal"]
    assert found["networks"]["watching"]["internal"]
    for service in found["services"].values():
        if "devices" in str(service.get("deploy")):
            assert set(service["networks"]) <= {"serving", "watching"}


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_is_latest_and_no_secret_is_inside(name):
    text = "\n".join(files(DOCKER / name).values())
    assert not re.search(r":latest|sk-[a-z0-9]{8}|BEGIN .*PRIVATE", text)
    assert not re.search(r"--api-key|API_KEY[:=]", text)


def test_edge_tries_again_before_the_first_byte_only_and_not_after_a_timeout():
    text = (DOCKER / "single-node" / "edge" / "nginx.conf").read_text()
    (line,) = re.findall(r"proxy_next_upstream (.*);", text)
    assert {"error", "http_503", "non_idempotent"} <= set(line.split())
    assert "timeout" not in line
    assert "proxy_buffering off;" in text
    assert "proxy_http_version 1.1;" in text


def ring(servers: dict[str, int]) -> tuple[list[int], list[str]]:
    """NGINX's ring of a consistent hash: 160 points for each unit of weight."""
    points = []
    for server, weight in servers.items():
        host, port = server.split(":")
        base, last = zlib.crc32(f"{host}\0{port}".encode()), 0
        for _ in range(160 * weight):
            last = zlib.crc32(last.to_bytes(4, "little"), base)
            points.append((last, server))
    points.sort()
    return [at for at, _ in points], [server for _, server in points]


def test_the_hash_spreads_sessions_by_weight(tmp_path):
    made(tmp_path)
    edited(tmp_path, main={"replicas": 4})
    made(tmp_path)
    lines = (tmp_path / "edge/servers-engines.conf").read_text()
    servers = {name: int(weight) for name, weight in re.findall(r"server (\S+) weight=(\d+)", lines)}
    at, who = ring(servers)
    hits = dict.fromkeys(servers, 0)
    for key in range(20_000):
        hits[who[bisect_left(at, zlib.crc32(f"agents:session-{key}".encode())) % len(at)]] += 1
    assert max(hits.values()) / (20_000 / 4) < 1.05


def test_weights_follow_speed_and_a_measured_one_wins(tmp_path):
    made(tmp_path, "burst", "voice-agent")
    sized = json.loads((tmp_path / "bundle.json").read_text())["pools"]
    ratio = sized["dedicated"]["speed"] / sized["spot"]["speed"]
    assert sized["spot"]["weight"] == 10
    assert sized["dedicated"]["weight"] == round(10 * ratio)
    edited(tmp_path, spot={"output_tokens_per_s": 2 * sized["dedicated"]["speed"]})
    made(tmp_path, "burst", "voice-agent")
    sized = json.loads((tmp_path / "bundle.json").read_text())["pools"]
    assert (sized["dedicated"]["weight"], sized["spot"]["weight"]) == (10, 20)


def test_a_burst_gpu_without_room_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rtx-5090-32gb leaves mistral-nemo-2407 room for 3 sessions of 8,192 tokens"):
        made(tmp_path, "burst")
    assert not list(tmp_path.iterdir())


def test_results_of_a_run_are_used_and_told(tmp_path):
    run = tmp_path / "runs" / H100
    same = {"gpu": H100, "model": "mistral-nemo-2407", "scenario": "customer-service"}
    for notebook, results in (
        ("05_tune_max_num_seqs", {"recommended": {"max_num_seqs": 48, "max_num_batched_tokens": 4096}}),
        ("04_load_test", {"gpu_count": 1, "curve": [{"output_tokens_per_s": 900.0}, {"output_tokens_per_s": 1800.0}]}),
    ):
        (run / notebook).mkdir(parents=True)
        record = same | {"source": "live", "results": results}
        (run / notebook / "results.json").write_text(json.dumps(record))
    made(tmp_path / "bundle", run=tmp_path / "runs")
    record = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    pool = record["values"]["pools"]["main"]
    assert pool["flags"]["max_num_seqs"] == 48
    assert pool["flags"]["max_num_batched_tokens"] == 4096
    assert (pool["provenance"], record["pools"]["main"]["speed"]) == ("measured", 1800.0)
    made(tmp_path / "other", gpu="h200-sxm-141gb", run=tmp_path / "runs")
    assert "modelled" in (tmp_path / "other" / "values.yaml").read_text()
    for path in run.rglob("results.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "ran without a GPU"}))
    made(tmp_path / "cpu", run=tmp_path / "runs")
    pool = yaml.safe_load((tmp_path / "cpu" / "values.yaml").read_text())["pools"]["main"]
    assert (pool["provenance"], pool["output_tokens_per_s"]) == ("modelled", None)


def test_a_scenario_may_hold_tuned_flags(tmp_path):
    text = yaml.safe_load((DATA / "scenarios" / "customer-service.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**text, "tuned": {"max_num_seqs": 33, "output_tokens_per_s": 1500}}))
    made(tmp_path / "bundle", scenario=path)
    pool = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["values"]["pools"]["main"]
    assert (pool["flags"]["max_num_seqs"], pool["output_tokens_per_s"], pool["provenance"]) == (33, 1500, "measured")


@pytest.mark.parametrize(
    ("engine", "flag"),
    [
        ("sglang", "--mem-fraction-static"),
        ("tensorrt-llm", "--max_batch_size"),
        ("tgi", "--max-total-tokens"),
        ("ollama", None),
    ],
)
def test_other_engines_drop_in(tmp_path, engine, flag):
    made(tmp_path, engine=engine)
    service = compose(tmp_path)["services"]["engine-0"]
    assert service["image"] == engine_data(engine)["start"]["image"].format(version=engine_data(engine)["newest"])
    if flag:
        assert flag in service["command"]
    else:
        assert service["environment"]["OLLAMA_CONTEXT_LENGTH"] == "8192"
        assert "command" not in service, "compose refuses a command that is null"


def test_several_engines_on_one_gpu_want_shares_and_say_what_they_cost(tmp_path):
    made(tmp_path, scenario="simple-qa")
    edited(tmp_path, main={"replicas": 2, "replicas_per_gpu": 2, "flags": {"gpu_memory_utilization": 0.45}})
    made(tmp_path, scenario="simple-qa")
    devices = [
        compose(tmp_path)["services"][f"engine-{n}"]["deploy"]["resources"]["reservations"]["devices"] for n in (0, 1)
    ]
    assert devices[0] == devices[1]
    (note,) = json.loads((tmp_path / "bundle.json").read_text())["warnings"]
    both, alone = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+)(?= KV| \()", note))
    assert both < 0.8 * alone


@pytest.mark.parametrize(("scenario", "missing"), [("multi-agent", ["codellama-13b"]), ("orchestrator", [])])
def test_a_model_of_the_scenario_that_no_pool_serves_is_told(tmp_path, scenario, missing):
    made(tmp_path, scenario=scenario)
    notes = json.loads((tmp_path / "bundle.json").read_text())["warnings"]
    assert [note.split()[2] for note in notes if "not served" in note] == missing


def test_engines_take_gpus_in_turn(tmp_path):
    made(tmp_path, "single-node", "api-cluster", gpu="h100-sxm-80gb")
    services = compose(tmp_path)["services"].items()
    engines = [one for name, one in services if name.startswith("engine-")]
    taken = [one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for one in engines]
    assert [gpu for one in taken for gpu in one] == [str(n) for n in range(8)]


def test_sticky_least_loaded_puts_a_router_behind(tmp_path):
    (tmp_path / "values.yaml").write_text("edge: {balance: sticky-least-loaded}\n")
    made(tmp_path)
    router = compose(tmp_path)["services"]["router"]
    assert "http://engine-1:8000" in router["command"]
    assert (tmp_path / "router" / "Dockerfile").read_text().startswith("# vllm-router")
    assert "proxy_pass http://router;" in (tmp_path / "edge" / "nginx.conf").read_text()
    assert not (DOCKER / "single-node" / "router").exists()


def test_a_machine_of_its_own_gets_a_whole_cloud_init(tmp_path):
    text = (DOCKER / "burst" / "hosts" / "spot.cloud-init.yaml").read_text()
    written = {one["path"]: one["content"] for one in yaml.safe_load(text)["write_files"]}
    assert "policy drop" in written["/etc/nftables.conf"]
    worker = yaml.safe_load(written["/opt/worker/compose.yaml"])["services"]
    assert worker["engine"]["ports"] == ["${ADDRESS}:8000:8000"]
    assert set(re.findall(r"@(\w+)@", text)) == {"ADDRESS", "PRIVATE_KEY", "EDGE_PUBLIC_KEY", "EDGE"}
    assert set(re.findall(r"@(\w+)@", (DOCKER / "burst" / "hosts" / "keys.sh").read_text())) == {
        "ADDRESS", "PRIVATE_KEY", "EDGE_PUBLIC_KEY", "EDGE",
    }  # fmt: skip


def test_litellm_sends_each_tier_through_the_edge():
    config = yaml.safe_load((DOCKER / "tiered" / "litellm" / "config.yaml").read_text())
    bases = {one["model_name"]: one["litellm_params"].get("api_base") for one in config["model_list"]}
    assert bases["mistral-7b-v0.3"] == "http://edge:8100/v1"
    assert bases["mistral-nemo-2407"] == "http://edge:8101/v1"
    assert config["router_settings"]["fallbacks"][0] == {"mistral-7b-v0.3": ["mistral-nemo-2407"]}
    text = (DOCKER / "tiered" / "edge" / "nginx.conf").read_text()
    assert "listen 8100;" in text
    assert "listen 8101;" in text


def test_cluster_scales_on_names_that_exist():
    scale = (DOCKER / "multi-node" / "scale.yaml").read_text()
    queries = [one["metadata"]["query"] for one in yaml.safe_load(scale)["spec"]["triggers"]]
    assert queries == [
        'sum(vllm:num_requests_waiting{model_name="llama-3.1-70b"})',
        'avg(vllm:kv_cache_usage_perc{model_name="llama-3.1-70b"})',
    ]


def test_a_model_beyond_one_node_is_cut_into_pipeline_stages(tmp_path):
    text = yaml.safe_load((DATA / "scenarios" / "api-cluster.yaml").read_text())
    path = tmp_path / "big.yaml"
    path.write_text(yaml.safe_dump({**text, "model": "deepseek-v3", "sessions": 20, "models": []}))
    made(tmp_path / "bundle", "multi-node", path, gpu="h100-sxm-80gb")
    spec = yaml.safe_load((tmp_path / "bundle" / "engine.yaml").read_text())["spec"]["leaderWorkerTemplate"]
    leader, worker = (spec[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert spec["size"] == 2
    assert leader["args"][leader["args"].index("--tensor-parallel-size") + 1] == "8"
    assert leader["args"][leader["args"].index("--pipeline-parallel-size") + 1] == "2"
    assert "--headless" in worker["args"]
    assert worker["resources"]["limits"]["rdma/ib"] == "1"
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in worker["env"]
    assert not (tmp_path / "bundle" / "production-stack").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no key"),
        ("agents short", "32 characters"),
        ("agents " + "a" * 40 + ' ";}', "NAME KEY"),
        ('ag"ents ' + "a" * 40, "only letters"),
    ],
)
def test_the_edge_does_not_start_with_a_bad_key(tmp_path, line, told):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "api_keys").write_text(line + "\n")
    edge = DOCKER / "single-node" / "edge"
    where = {"EDGE_CONF": str(edge), "EDGE_RUN": str(tmp_path / "run"), "EDGE_SECRETS": str(tmp_path / "secrets")}
    done = subprocess.run(
        ["sh", edge / "start.sh"], env=where | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert told in done.stderr


def test_secrets_are_made_once_and_closed(tmp_path):
    made(tmp_path)
    for _ in range(2):
        subprocess.run(["sh", tmp_path / "edge" / "secrets.sh", "alice", "bob"], check=True, capture_output=True)
    lines = (tmp_path / "secrets" / "api_keys").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["alice", "bob"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", line.split()[1]) for line in lines)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    made(tmp_path)
    assert (tmp_path / "secrets" / "api_keys").read_text().splitlines() == lines


def kit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("kit"), "deploy", *words], capture_output=True, text=True)


def test_command_line(tmp_path):
    done = kit("--scenario", "simple-qa", "--architecture", "single-node", "--out", str(tmp_path / "b"), "--json")
    record = json.loads(done.stdout)
    assert (done.returncode, record["architecture"], record["target"]) == (0, "single-node", "compose")
    assert set(record["files"]) < set(files(tmp_path / "b"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--architecture", "ring"), "single-node"),
        (("--architecture", "multi-node", "--target", "compose"), "kubernetes"),
        (("--scenario", "nope"), "customer-service"),
        (("--gpu", "h1000"), "h100-pcie-80gb"),
        (("--engine", "vlm"), "sglang"),
        (("check", "/nowhere"), "/nowhere"),
        (("inspect", "x"), "check DIR"),
    ],
)
def test_command_line_names_what_is_wrong(words, told, tmp_path):
    done = kit(*words, *(() if words[0] in ("check", "inspect") else ("--out", str(tmp_path / "b"))))
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert not (tmp_path / "b").exists()
