"""Writes data/metric_pages: what a running server's metrics page names, with types, labels and edges.

    python benchmarks/record_metrics.py vllm|sglang       starts the engine of `make engine` (CPU), asks it, reads it
    python benchmarks/record_metrics.py URL NAME-VERSION  reads a page that is there, say an exporter's

Rules, dashboards and autoscalers may use no other names (kit deploy check). Values are left out: on a
CPU they are nobody's. A counter that is born with its first event needs that event, so the engine gets
streams, an answer that is not streamed, a refused request and a stream that its client gives up.
"""

import datetime
import json
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from kit.deploy.watch import PAGES
from kit.engine_config import engine_data
from kit.engines import launch, start
from kit.engines.launch import ENVIRONMENTS, free_port

OWN = ("python_", "process_")  # of the server's Python, not of serving


def told(text: str) -> dict[str, dict[str, Any]]:
    """Type, labels and, for histograms, edges of every metric on a page."""
    found: dict[str, dict[str, Any]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(OWN) or family.name.endswith("_created") or not family.samples:
            continue
        name = family.name + "_total" * (family.type == "counter" and family.samples[0].name.endswith("_total"))
        labels = sorted(
            {label for sample in family.samples for label in sample.labels if label not in ("le", "quantile")}
        )
        found[name] = {"type": family.type, "labels": labels}
        edges = sorted({sample.labels["le"] for sample in family.samples if "le" in sample.labels}, key=float)
        if edges:
            found[name]["edges"] = edges[:-1]
    return found


def write(name: str, how: str, metrics: dict[str, Any]) -> None:
    path = PAGES / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    head = {"page": name, "recorded": datetime.date.today().isoformat(), "how": how}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()] + ["metrics:"]
    dumped = {
        key: yaml.safe_dump(value, default_flow_style=True, width=10_000).strip() for key, value in metrics.items()
    }
    path.write_text("\n".join(lines + [f"  {key}: {value}" for key, value in sorted(dumped.items())]) + "\n")
    print(f"{path.name}: {len(metrics)} metrics")


def ask(base_url: str, model: str, **more: Any) -> int:
    """One chat request, read to its end; the status."""
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "Say something."}], **more}
    request = urllib.request.Request(
        base_url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def give_up(host: str, port: int, model: str) -> None:
    """A stream whose client leaves after the first bytes."""
    asked = {"model": model, "max_tokens": 200, "stream": True, "ignore_eos": True}
    body = json.dumps({**asked, "messages": [{"role": "user", "content": "Go on."}]}).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, port)) as link:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
        link.recv(4096)


def engine_page(engine: str) -> tuple[str, str]:
    """The page of the engine in .engines after it served, and its version."""
    model, data = ENVIRONMENTS / "tiny-model", engine_data(engine)
    flags = {"--enable-metrics": ""} if engine == "sglang" else {}
    with tempfile.TemporaryDirectory() as folder:
        at = launch(engine, str(model), flags, port=free_port(), served_model_name="tiny")
        with start(at, Path(folder) / "log", tell=print) as running:
            statuses = [ask(at.base_url, "tiny", stream=stream) for stream in (True, False, True)]
            statuses.append(ask(at.base_url, "tiny", max_tokens=10_000_000))
            give_up(at.host, at.port, "tiny")
            statuses.append(ask(at.base_url, "tiny"))
            print("answers:", statuses)
            with urllib.request.urlopen(at.base_url + data["metrics"]["path"]) as answer:
                text = answer.read().decode()
            log = running.start_log()
    return text, log.get("version", str(data["newest"]))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with urllib.request.urlopen(sys.argv[1]) as answer:
            write(sys.argv[2], "read from a running one", told(answer.read().decode()))
    else:
        page, version = engine_page(sys.argv[1])
        write(
            f"{sys.argv[1]}-{version}",
            "the engine on a CPU with a tiny model, after streams, a refusal and an abort",
            told(page),
        )
