"""The real vllm-router and LiteLLM, as bundles configure them, between the bundle's nginx and emulators."""

from pathlib import Path

import pytest
import yaml
from behind_nginx import OPEN, Answer, ask, bundle, kill, needs_nginx, told, until

from kit import measure
from kit.catalog.paths import DATA
from kit.deploy import Source, render
from kit.deploy.stage import localised, stage
from kit.engine_config import EngineConfig
from kit.engines.control import Engine, start
from kit.engines.launch import Launch, free_port
from kit.scenario import load

DEPLOY = DATA.parent / ".deploy"
ROUTER, LITELLM = DEPLOY / "router" / "bin" / "vllm-router", DEPLOY / "litellm" / "bin" / "litellm"
pytestmark = needs_nginx
KEY = "sk-" + "0" * 32
LONG = (
    "Think step by step and prove it. Design a distributed consensus algorithm, analyse its complexity, compare the "
    "trade-offs of Raft and Paxos, and implement both in Python with unit tests. First reason about the failure modes, "
    "then derive the invariants, then write the code."
)


def part(name: str, argv: list[str], port: int, health: str, folder: Path, **environment: str) -> Engine:
    return start(
        Launch(name, argv, environment, "127.0.0.1", port, name, health, []), folder / f"{name}.log", deadline_s=120
    )


def command_of(folder: Path, service: str, addresses: dict[str, str], port: int) -> list[str]:
    """The command of a service of the compose file, with this machine's addresses."""
    words = yaml.safe_load((folder / "compose.yaml").read_text())["services"][service]["command"]
    words = [localised(str(word), addresses) for word in words]
    words[words.index("--port") + 1], words[words.index("--host") + 1] = str(port), "127.0.0.1"
    return words


@pytest.mark.skipif(not ROUTER.exists(), reason="make .deploy/router/.done installs the router")
def test_the_router_keeps_sessions_and_spreads_them_exactly(tmp_path):
    folder = bundle(tmp_path / "bundle", 4, balance="sticky-least-loaded")
    engines = [
        measure.emulate(
            "llama-3.1-8b", "h100-sxm-80gb", EngineConfig(max_model_len=8192), tmp_path / f"{n}.log", {"pace": "5,2"}
        )
        for n in range(4)
    ]
    router = None
    try:
        addresses = {f"engine-{n}:8000": f"127.0.0.1:{one.launch.port}" for n, one in enumerate(engines)}
        port, metrics = free_port(), free_port()
        argv = [str(ROUTER), *command_of(folder, "router", addresses | {"29000": str(metrics)}, port)]
        router = part("router", argv, port, "/health", tmp_path)
        with stage(folder, addresses | {"router:8000": f"127.0.0.1:{port}"}, tmp_path / "stage") as made:
            counts = lambda: [told(one).histograms["ttft"].count for one in engines]  # noqa: E731
            before, homes = counts(), []
            for session in range(200):
                for _ in range(2):
                    answer = ask(made, f"session-{session}", tokens=2)
                    assert (answer.status, answer.whole) == (200, True)
                now = counts()
                homes.append([b - a for a, b in zip(before, now, strict=True)])
                before = now
            assert sum(max(home) == 2 for home in homes) / 200 >= 0.99
            loads = [sum(column) for column in zip(*homes, strict=True)]
            assert max(loads) / (sum(loads) / 4) <= 1.2, loads
            kill(engines[0])
            after = [ask(made, f"session-{session}", tokens=2) for session in range(40)]
            assert {one.status for one in after} == {200}
            slow = ask(made, "session-0", tokens=40)
            assert slow.tokens_at_first < slow.tokens == 40
    finally:
        for one in [*engines, *([router] if router else [])]:
            one.stop()


@pytest.mark.skipif(not LITELLM.exists(), reason="make .deploy/litellm/.done installs LiteLLM")
def test_litellm_sends_by_complexity_and_falls_back(tmp_path):
    folder = tmp_path / "bundle"
    source = Source(load("customer-service"), "h100-sxm-80gb")
    render(source, "tiered", folder)
    values = yaml.safe_load((folder / "values.yaml").read_text())
    values["edge"] |= OPEN
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    render(source, "tiered", folder)
    names = {pool: one["served_model_name"] for pool, one in values["pools"].items()}
    engines: dict[str, Engine] = {}
    proxy = None
    try:
        for pool, name in names.items():
            engines[pool] = measure.emulate(
                name, "h100-sxm-80gb", EngineConfig(max_model_len=8192), tmp_path / f"{pool}.log", {"pace": "5,2"}
            )
            line = f"server 127.0.0.1:{engines[pool].launch.port} max_fails=3 fail_timeout=10s; # /health\n"
            (folder / "edge" / f"servers-{pool}.conf").write_text(line)
        port = free_port()
        with stage(folder, {"litellm:4000": f"127.0.0.1:{port}"}, tmp_path / "stage") as made:
            inner = {f"edge:{there}": f"127.0.0.1:{here}" for there, here in made.ports.items()}
            config = tmp_path / "config.yaml"
            config.write_text(localised((folder / "litellm" / "config.yaml").read_text(), inner))
            words = command_of(folder, "litellm", {"/etc/litellm/config.yaml": str(config)}, port)
            words[words.index("--num_workers") + 1] = "1"
            (made.folder / "edge" / "upstream_key.map").write_text(f'"~." "Bearer {KEY}";\n')  # start.sh, of a secret
            made.reload()
            more = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
            proxy = part("litellm", [str(LITELLM), *words], port, "/health/liveliness", tmp_path, **more)
            front = next(
                one["model_name"]
                for one in yaml.safe_load(config.read_text())["model_list"]
                if "auto_router" in one["litellm_params"]["model"]
            )

            def served(text: str, model: str = front) -> tuple[Answer, str]:
                before = {pool: told(one).histograms["ttft"].count for pool, one in engines.items()}
                answer = ask(made, "s", tokens=20, text=text, model=model)
                grown = [pool for pool, one in engines.items() if told(one).histograms["ttft"].count > before[pool]]
                return answer, "+".join(grown)

            simple, where = served("hi")
            assert (simple.status, simple.whole, where) == (200, True, "small")
            assert simple.tokens_at_first < simple.tokens
            hard, where = served(LONG)
            assert (hard.status, hard.whole, where) == (200, True, "large")
            assert served("hi", names["large"])[1] == "large"
            kill(engines["small"])
            small = engines.pop("small")
            assert until(lambda: served("hi")[0].status == 200)
            assert served("hi")[1] == "large"
            small.stop()
    finally:
        for one in [*engines.values(), *([proxy] if proxy else [])]:
            one.stop()
