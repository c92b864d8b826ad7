"""What the tests of a bundle share: bundles, emulators behind their edge, clients."""

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import yaml

from kit import measure
from kit.deploy import Source, render
from kit.deploy.stage import Stage, stage
from kit.engine_config import EngineConfig
from kit.engines.control import Engine
from kit.scenario import load
from kit.telemetry import read_page

MODEL, GPU = "llama-3.1-8b", "h100-sxm-80gb"
OPEN = {"connections_per_key": 20_000, "requests_per_s_per_key": 20_000, "worker_processes": 2}


def bundle(folder: Path, replicas: int, **edge: Any) -> Path:
    """A single-node bundle with so many engines and these values of its edge, changed as a user changes them."""
    source = Source(load("burst-10000"), GPU)
    render(source, "single-node", folder)
    values = yaml.safe_load((folder / "values.yaml").read_text())
    values["pools"]["main"] |= {"replicas": replicas, "gpu_count": 1}
    values["pools"]["main"]["flags"]["tensor_parallel_size"] = 1
    values["edge"] |= OPEN | edge
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    render(source, "single-node", folder)
    return folder


@contextmanager
def staged(folder: Path, engines: list[dict], edge: dict | None = None, peers: tuple = (), **how: Any) -> Iterator[Any]:
    """Emulators with these options, and peers that listen already, behind nginx (and Prometheus where there is one)."""
    given = [(options.pop("config", EngineConfig(max_model_len=8192)), options) for options in map(dict, engines)]
    running: list[Engine] = []
    try:
        for number, (config, more) in enumerate(given):
            running.append(measure.emulate(MODEL, GPU, config, folder / f"emulator-{number}", more))
        ports = [one.launch.port for one in running] + list(peers)
        addresses = {f"engine-{n}:8000": f"127.0.0.1:{port}" for n, port in enumerate(ports)}
        with stage(bundle(folder / "bundle", len(ports), **(edge or {})), addresses, folder / "stage", **how) as made:
            yield made, running
    finally:
        for one in running:
            one.stop()


@dataclass
class Answer:
    """What a client got of one request."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reads: int = 0  # pieces that came one after another
    tokens_at_first: int = 0  # tokens in the first piece
    whole: bool = False  # ended as HTTP says, with [DONE] where it is a stream

    @property
    def tokens(self) -> int:
        return len(re.findall(rb'"content": ?"[^"]', self.body))


def ask(
    made: Stage, session: str = "", tokens: int = 8, stream: bool = True, key: str | None = None, text: str = "Hi",
    model: str = MODEL,
) -> Answer:  # fmt: skip
    """One chat request through the edge, read as it comes."""
    answer = Answer()
    body = {
        "model": model,
        "max_tokens": tokens,
        "stream": stream,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": text}],
    }
    headers = {"Content-Type": "application/json"} | ({"X-Session-Id": session} if session else {})
    if key != "":
        headers["Authorization"] = f"Bearer {key or made.key}"
    host = made.base_url.removeprefix("http://")
    link = http.client.HTTPConnection(host, timeout=300)
    try:
        link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        got = link.getresponse()
        answer.status, answer.headers = got.status, dict(got.getheaders())
        while piece := got.read1():
            answer.body += piece
            answer.reads += 1
            answer.tokens_at_first = answer.tokens_at_first or answer.tokens
        answer.whole = not stream or b"[DONE]" in answer.body
    except (http.client.HTTPException, ConnectionError):
        pass
    finally:
        link.close()
    return answer


def many(made: Stage, sessions: list[str], meanwhile: Callable[[], Any] = lambda: None, **how: Any) -> list[Answer]:
    """Requests at once, and what happens while they run."""
    with ThreadPoolExecutor(len(sessions)) as pool:
        asked = [pool.submit(ask, made, session, **how) for session in sessions]
        meanwhile()
        return [one.result() for one in asked]


def told(engine: Engine) -> Any:
    with urllib.request.urlopen(engine.launch.base_url + "/metrics") as page:
        return read_page(page.read().decode())


def until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes true in time."""
    begun = monotonic()
    while not (found := true()) and monotonic() - begun < seconds:
        pass
    return found


def kill(engine: Engine) -> None:
    """As a host dies: no goodbye."""
    os.killpg(engine.process.pid, signal.SIGKILL)


names = map("session-{}".format, itertools.count())
needs_nginx = [pytest.mark.deploy, pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")]
