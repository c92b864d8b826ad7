"""A bundle's edge and its Prometheus as processes of this machine, before engines that listen here."""

import json
import os
import re
import resource
import secrets
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.engines.control import Engine, start
from kit.engines.launch import Launch, free_port

PROGRAMS = {
    "edge": "nginx", "prometheus": "prometheus", "exporter": "prometheus-nginx-exporter",
    "alertmanager": "prometheus-alertmanager",
}  # fmt: skip
SCRAPE_MS = 250  # the shortest gap between scrapes of a faster clock
_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
# Durations of rules and of prometheus.yml, not the digits in a rule's name.
_DURATION = re.compile(r"((?:\[|for: |offset |_interval: |_wait: ))(\d+)(ms|s|m|h|d)\b")


@dataclass
class Stage:
    """What runs: the edge's address, a key that it takes, the parts by name; leaving its `with` block stops all."""

    folder: Path
    base_url: str = ""
    key: str = ""
    parts: dict[str, Engine] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)  # of the edge here, by those of its configuration

    def reload(self) -> None:
        """Let nginx read its configuration again; raises CalledProcessError where it does not load."""
        subprocess.run([*nginx(self.folder / "edge"), "-s", "reload"], check=True, capture_output=True)

    def query(self, expression: str, **span: float) -> list[dict[str, Any]]:
        """Prometheus' answer now, or from `start` to `end` each `step` seconds: metric and value or values."""
        how = "query_range" if span else "query"
        asked = urllib.parse.urlencode({"query": expression, **span})
        with urllib.request.urlopen(f"{self.parts['prometheus'].launch.base_url}/api/v1/{how}?{asked}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def stop(self) -> None:
        """Stop every part."""
        for part in reversed(self.parts.values()):
            part.stop()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def missing() -> list[str]:
    """Programs of a stage that this machine lacks."""
    return [name for name in PROGRAMS.values() if shutil.which(name) is None]


def nginx(run: Path) -> list[str]:
    """The command that speaks to the nginx of that run folder."""
    return ["nginx", "-p", str(run), "-c", str(run / "nginx.conf")]


def stage(
    bundle: Path, addresses: Mapping[str, str], folder: Path, faster: float = 1.0, webhook: str = ""
) -> Stage:  # fmt: skip
    """Start what of the bundle this machine has; `addresses` says where each HOST:PORT of it listens here.

    `faster` divides every duration of the monitoring, so that an alert that waits for two minutes waits for four
    seconds at 30; the Alertmanager's messages go to the `webhook`, where there is one. Raises EngineFailed with the
    decisive line of a part's log.
    """
    made = Stage(folder)
    try:
        if shutil.which("nginx"):
            _edge(made, bundle, dict(addresses))
        if shutil.which("prometheus"):
            _watch(made, bundle, dict(addresses), faster, webhook)
    except BaseException:
        made.stop()
        raise
    return made


def localised(text: str, addresses: Mapping[str, str]) -> str:
    """A file of the bundle with addresses of this machine instead of its own.

    >>> localised("server engine-1:8000 weight=10; server engine-11:8000;", {"engine-1:8000": "127.0.0.1:5001"})
    'server 127.0.0.1:5001 weight=10; server engine-11:8000;'
    """
    for there, here in addresses.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(there)}(?!\d)", here, text)
    return text


def edge_files(bundle: Path, folder: Path, addresses: Mapping[str, str], ports: Mapping[str, int]) -> None:
    """The edge's files as this machine can run them: addresses, listening ports, a user that may read them."""
    folder.mkdir(parents=True, exist_ok=True)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for path in sorted((bundle / "edge").iterdir()):
        text = localised(path.read_text(encoding="utf-8"), addresses)
        if path.name == "nginx.conf":
            text = re.sub(r"listen (\d+)", lambda found: f"listen 127.0.0.1:{ports[found[1]]}", text)
            text = re.sub(r"(worker_rlimit_nofile) (\d+)", lambda found: f"{found[1]} {min(int(found[2]), most)}", text)
            text = "user root;\n" * (os.geteuid() == 0) + text  # workers read the run folder, which is closed to others
        (folder / path.name).write_text(text, encoding="utf-8")


def listens(bundle: Path) -> list[str]:
    """Ports that the edge listens on, the public one first."""
    return re.findall(r"listen (\d+)", (bundle / "edge" / "nginx.conf").read_text(encoding="utf-8"))


def _edge(made: Stage, bundle: Path, addresses: dict[str, str]) -> None:
    conf, run, keys = (made.folder / name for name in ("edge-conf", "edge", "secrets"))
    made.ports = {port: free_port() for port in listens(bundle)}
    edge_files(bundle, conf, addresses, made.ports)
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    made.key = secrets.token_hex(32)
    (keys / "api_keys").write_text(f"stage {made.key}\n", encoding="utf-8")
    places = {"EDGE_CONF": str(conf), "EDGE_RUN": str(run), "EDGE_SECRETS": str(keys)}
    public, status, *_ = made.ports.values()
    made.parts["edge"] = _part("edge", ["sh", str(conf / "start.sh")], places, public, "/health", made.folder)
    made.base_url = made.parts["edge"].launch.base_url
    if shutil.which(PROGRAMS["exporter"]):
        port = free_port()
        argv = [PROGRAMS["exporter"], f"-web.listen-address=127.0.0.1:{port}"]
        argv.append(f"-nginx.scrape-uri=http://127.0.0.1:{status}/stub_status")
        made.parts["exporter"] = _part("exporter", argv, {}, port, "/metrics", made.folder)


def _watch(made: Stage, bundle: Path, addresses: dict[str, str], faster: float, webhook: str) -> None:
    """Prometheus and, where messages can go somewhere, the Alertmanager."""
    if "exporter" in made.parts:
        addresses |= {"edge-exporter:9113": f"127.0.0.1:{made.parts['exporter'].launch.port}"}
    there, here, hook = bundle / "monitoring", made.folder / "monitoring", made.folder / "alert_webhook_url"
    alerting, port = free_port(), free_port()
    addresses |= {"alertmanager:9093": f"127.0.0.1:{alerting}", "/run/secrets/alert_webhook_url": str(hook)}
    for path in (path for path in sorted(there.rglob("*.yml")) if "grafana" not in path.parts):
        target = here / path.relative_to(there)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = localised(path.read_text(encoding="utf-8"), addresses)
        target.write_text(sped_up(text, faster) if faster != 1 else text, encoding="utf-8")
    (here / "targets" / "gpu.yml").write_text("[]\n", encoding="utf-8")  # nobody tells of GPUs here
    if webhook and shutil.which(PROGRAMS["alertmanager"]):
        hook.write_text(webhook, encoding="utf-8")
        argv = [PROGRAMS["alertmanager"], f"--config.file={here / 'alertmanager.yml'}", "--cluster.listen-address="]
        argv += [f"--web.listen-address=127.0.0.1:{alerting}", f"--storage.path={made.folder / 'alertmanager'}"]
        made.parts["alertmanager"] = _part("alertmanager", argv, {}, alerting, "/-/ready", made.folder)
    argv = ["prometheus", f"--config.file={here / 'prometheus.yml'}", f"--web.listen-address=127.0.0.1:{port}"]
    argv += [f"--storage.tsdb.path={made.folder / 'tsdb'}", "--scrape.discovery-reload-interval=250ms"]
    made.parts["prometheus"] = _part("prometheus", argv, {}, port, "/-/ready", made.folder)


def sped_up(text: str, faster: float) -> str:
    """Rules or prometheus.yml with every duration divided.

    >>> sped_up("record: a:ratio5m\\nexpr: rate(b[5m])\\nfor: 2m", 30)
    'record: a:ratio5m\\nexpr: rate(b[10000ms])\\nfor: 4000ms'
    """

    def shorter(found: re.Match[str]) -> str:
        least = SCRAPE_MS if found[1].endswith("_interval: ") else 4 * SCRAPE_MS
        return f"{found[1]}{max(least, round(int(found[2]) * _UNITS_MS[found[3]] / faster))}ms"

    return _DURATION.sub(shorter, text)


def _part(name: str, argv: list[str], environment: dict[str, str], port: int, health: str, folder: Path) -> Engine:
    launch = Launch(name, argv, environment, "127.0.0.1", port, name, health, [])
    return start(launch, folder / f"{name}.log", deadline_s=60)
