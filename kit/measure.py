"""What a notebook measures: an emulated engine that it starts, a live server, or a recorded run."""

import http.client
import json
import os
import resource
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zlib import crc32

import pandas as pd

from kit import loadgen
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig
from kit.engines.control import Engine, start
from kit.engines.launch import Launch, free_port
from kit.errors import UserError
from kit.loadgen import Level, Options, Target
from kit.telemetry import GpuSampler

LABELS = {
    "emulator": "emulator: the modelled engine, not a GPU's speed",
    "live": "live server, measured by this client",
    "recorded": "recorded run, measured",
    "cpu": "live server on this host without a GPU: its behaviour, never a GPU's speed",
}


@dataclass(frozen=True)
class Bench:
    """Where levels are measured: a server, or a folder that holds what one gave."""

    source: str  # emulator also where a live server says that it is one
    target: Target | None  # None: recorded
    folder: Path  # holds LEVEL/summary.json and LEVEL/requests.jsonl
    options: Options
    engine: Engine | None = None  # that was started for it; `stop` it
    scratch: Any = None  # a temporary folder lives as long as this

    def measure(self, level: Level) -> tuple[dict[str, Any], pd.DataFrame]:
        """A level's summary (keys of `kit load --json`) and its requests; read where it was measured before."""
        place = self.folder / level.name
        if self.target is not None:
            what = {**asdict(self.target), "sessions": crc32(repr(level.sessions).encode())}
            loadgen.measure(self.target, [level], self.options, place, what)
        elif not place.exists():
            raise UserError(f"recorded run {self.folder} holds no level {level.name}")
        summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
        return summary, pd.read_json(place / "requests.jsonl", lines=True)

    def ask_json(self, text: str, response_format: dict[str, Any], max_tokens: int) -> Any:
        """One answer in JSON, parsed; None where it is none, or nobody can be asked."""
        if self.target is None:
            return None
        body = {"model": self.target.model, "response_format": response_format, "max_tokens": max_tokens}
        answer = call(self.target, "/chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
        try:
            return json.loads(answer["choices"][0]["message"]["content"])
        except ValueError:
            return None


def bench(
    source: str, model: str, gpu: str, config: EngineConfig, options: Options, place: Path | str | None = None,
    base_url: str = "", api_key_env: str = "", **more: Any,
) -> Bench:  # fmt: skip
    """The emulator of that engine (started here, with `more` options), the live server, or the run recorded in `place`.

    What a live server gives is kept in `place`, so that an interrupted run goes on where it was.
    """
    folder = Path(place) if place else None
    if source == "recorded":
        if folder is None or not any(folder.glob("*/summary.json")):
            there = ", ".join(recordings()) or "no GPU run is recorded yet"
            raise UserError(f"recorded run {str(place or '')!r}: nothing there; in data/recorded: {there}")
        return Bench(source, None, folder, options)
    scratch = tempfile.TemporaryDirectory(prefix="kit-")
    if source == "emulator":
        engine = emulate(model, gpu, config, Path(scratch.name) / "emulator.log", more)
        return Bench(source, Target(engine.launch.base_url, model), Path(scratch.name), options, engine, scratch)
    target = Target(base_url, model, api_key_env=api_key_env or None)
    told = card(target)
    source = "emulator" if told.get("emulated") else source  # ours says so; nothing of it is a measured speed
    served = replace(target, model=told["id"])
    return Bench(source, served, folder or Path(scratch.name), options, scratch=scratch)


def label(source: str, base_url: str = "") -> str:
    """Where numbers come from, in the words that stand under each figure; a server of this host has its GPU or none."""
    here = urlsplit(base_url).hostname in (None, "localhost", "127.0.0.1", "::1")
    return LABELS["cpu" if source == "live" and here and not GpuSampler().handles else source]


def recordings() -> list[str]:
    """The runs in data/recorded."""
    return sorted({str(path.parent.parent) for path in DATA.glob("recorded/**/summary.json")})


def host_limits(streams: int) -> list[dict[str, Any]]:
    """What this host's kernel allows against what `streams` at once need; None where it does not say."""
    rows = []
    for row in load_yaml(DATA / "host_limits.yaml"):
        path, needed, now = Path(row.get("path", "/")), streams + row.get("more", 0), None
        if "rlimit" in row:
            now = resource.getrlimit(resource.RLIMIT_NOFILE)[row["rlimit"]] % sys.maxsize  # -1: without limit
        elif path.exists():
            ends = [int(word) for word in path.read_text().split()]
            now = ends[-1] - ends[0] + 1 if len(ends) > 1 else ends[0]
        told = {"limit": row["limit"], "now": now, "needed": needed, "enough": None if now is None else now >= needed}
        rows.append({**told, "below it": row["below"], "raise it": row["raise"].format(needed=needed)})
    return rows


def emulate(model: str, gpu: str, config: EngineConfig, log: Path, more: dict[str, Any]) -> Engine:
    """`kit emulate` on a free port; it ends with this process, however that ends."""
    return _serve("emulate", {"model": model, "gpu": gpu, **asdict(config), **more}, model, log)


def record(target: Target, out: Path) -> Engine:
    """`kit record` between agents and that server, writing to `out`; it too ends with this process."""
    return _serve("record", {"upstream": target.base_url, "out": out}, target.model, out.with_suffix(".log"))


def _serve(command: str, given: dict[str, Any], model: str, log: Path) -> Engine:
    port = free_port()
    flags = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value not in (None, False)}
    argv = [sys.executable, "-c", "from kit.cli import main; main()", command, "--port", str(port)]
    argv += [part for flag, value in flags.items() for part in (flag, str(value))[: 1 if value is True else 2]]
    return start(Launch(given.get("engine", command), argv, {}, "127.0.0.1", port, model, "/health", []), log)


def card(target: Target) -> dict[str, Any]:
    """The first model of /v1/models."""
    try:
        return dict(call(replace(target, timeout_s=10.0), "/models")["data"][0])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"--base-url {target.base_url}: no model in /v1/models ({reason})") from None


def call(target: Target, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that its /v1 answers there; POST with a body. Raises OSError or ValueError."""
    key = os.environ.get(target.api_key_env or "", "")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{target.root}/v1{path}", json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=target.timeout_s) as answer:
        return json.load(answer)
