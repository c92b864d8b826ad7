"""Writes data/metric_pages: what a running server's metrics page names, with types, labels and edges.

    python benchmarks/record_metrics.py vllm|sglang       starts the engine of `make engine` (CPU), asks it, reads it
    python benchmarks/record_metrics.py URL NAME-VERSION  reads a page that is there, say an exporter's

Rules, dashboards and autoscalers may use no other names (kit deploy check). Values are left out: on a
CPU they are nobody's. A counter that is born with its first event needs that event, so the engine gets
streams, an answer that is not streamed, a refused request, a stream that its client gives up, and more
requests than its KV pool holds.
"""

import datetime
import json
import re
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from kit.deploy.watch import PAGES
from kit.engine_config import engine_data
from kit.engines import launch, start
from kit.engines.launch import ENVIRONMENTS, free_port

OWN = ("python_", "process_")  # of the server's Python, not of serving


def told(text: str) -> dict[str, dict[str, Any]]:
    """Type, labels and, for histograms, edges of every metric on a page that has a sample, spelled as it is there."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    found: dict[str, dict[str, Any]] = {}
    for name, given in re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        stem = name if name in kinds else re.sub(r"_(bucket|sum|count)$", "", name)
        if stem.startswith(OWN) or stem.endswith("_created"):
            continue
        one = found.setdefault(stem, {"type": kinds[stem], "labels": set(), "edges": []})
        labels = dict(re.findall(r'(\w+)="((?:[^"\\\\]|\\\\.)*)"', given))
        edge = labels.pop("le", None)
        labels.pop("quantile", None)
        one["labels"] |= labels.keys()
        if edge not in (None, "+Inf", *one["edges"]):
            one["edges"].append(edge)
    return {
        name: {"type": one["type"], "labels": sorted(one["labels"])} | ({"edges": one["edges"]} if one["edges"] else {})
        for name, one in found.items()
    }


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
    flags = (
        {"--enable-metrics": "", "--max-total-tokens": 512, "--schedule-conservativeness": 0.01}
        if engine == "sglang"
        else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        at = launch(engine, str(model), flags, port=free_port(), served_model_name="tiny")
        with start(at, Path(folder) / "log", tell=print) as running:
            statuses = [ask(at.base_url, "tiny", stream=stream) for stream in (True, False, True)]
            statuses.append(ask(at.base_url, "tiny", max_tokens=10_000_000))
            give_up(at.host, at.port, "tiny")
            statuses.append(ask(at.base_url, "tiny"))
            with ThreadPoolExecutor(12) as crowd:  # more than the pool holds: some are taken back and computed again
                statuses += crowd.map(lambda _: ask(at.base_url, "tiny", max_tokens=150, ignore_eos=True), range(24))
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
            "the engine on a CPU with a tiny model, after streams, a refusal, an abort and a crowd",
            told(page),
        )
