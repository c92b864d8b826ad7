"""Something to watch: emulators behind a bundle's edge and Prometheus, or one server's metrics page, read here."""

import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kit import measure
from kit.catalog.paths import DATA, load_yaml
from kit.deploy.bundle import render
from kit.deploy.stage import PROGRAMS, SCRAPE_MS, Stage, missing, stage
from kit.deploy.values import Source
from kit.engine_config import EngineConfig
from kit.engines.control import Engine
from kit.errors import UserError
from kit.loadgen import Target
from kit.telemetry import ServerMetrics, read_page

KEY = "KIT_SCENE_KEY"
START_S = 60.0
SMALL = {"model": "llama-3.1-8b", "quantization": None, "context_tokens": 4096, "sessions": 1, "models": ()}
Curves = dict[str, tuple[list[float], list[float]]]


@dataclass
class Scene:
    """What is loaded (`target`) and who looks at it; times are seconds since it began."""

    target: Target
    how: str
    faster: float
    emulated: bool = True  # nothing of it is a GPU's speed
    stage: Stage | None = None
    engines: list[Engine] = field(default_factory=list)
    samples: list[tuple[float, ServerMetrics]] = field(default_factory=list)
    begun: float = field(default_factory=time.time)
    over: threading.Event = field(default_factory=threading.Event)
    scratch: Any = None

    def now(self) -> float:
        """Seconds since it began."""
        return time.time() - self.begun

    def panel(self, lines: Mapping[str, str]) -> Curves:
        """Curves of a panel's queries by legend; those that nobody can answer here are left out."""
        if self.stage is None:
            known = {legend: OWN[query] for legend, query in lines.items() if query in OWN}
            times = [at for at, _ in self.samples]
            return {legend: (times, [ask(page) for _, page in self.samples]) for legend, ask in known.items()}
        curves: Curves = {}
        for legend, query in lines.items():
            for one in self._range(query):
                name = legend.replace("{{instance}}", one["metric"].get("instance", ""))
                pairs = [(at - self.begun, float(value)) for at, value in one["values"]]
                curves[name] = ([at for at, _ in pairs], [value for _, value in pairs])
        return curves

    def alerts(self) -> list[dict[str, Any]]:
        """Each alert that fired: severity, and from when until when, in seconds of the scene."""
        if self.stage is None:
            return self._judged()
        times: dict[tuple[str, str], list[float]] = {}
        for one in self._range('ALERTS{alertstate="firing"}'):
            key = one["metric"]["alertname"], one["metric"]["severity"]
            times.setdefault(key, []).extend(at - self.begun for at, _ in one["values"])
        told = [(min(at), max(at), *key) for key, at in times.items()]
        return [dict(zip(("from_s", "until_s", "alert", "severity"), one, strict=True)) for one in sorted(told)]

    def stop(self) -> None:
        """Stop everything that was started for it."""
        self.over.set()
        if self.stage:
            self.stage.stop()
        for one in self.engines:
            one.stop()

    def _range(self, query: str) -> list[dict[str, Any]]:
        assert self.stage
        return self.stage.query(query, start=self.begun, end=time.time(), step=SCRAPE_MS / 1e3)

    def poll(self, base_url: str) -> None:
        """Read the metrics page until the scene is over."""
        url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
        while not self.over.wait(SCRAPE_MS / 1e3):
            with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                if page := read_page(answer.read().decode(errors="replace")):
                    self.samples.append((self.now(), page))

    def _judged(self) -> list[dict[str, Any]]:
        """The two scale alerts by the bundle's own limits, on what was read here."""
        limits, rows = load_yaml(DATA / "watch.yaml")["thresholds"], []
        for name, (query, limit, for_s) in SCALE.items():
            above = [at for at, page in self.samples if OWN[query](page) > limits[limit]]
            if above and max(above) - min(above) >= for_s / self.faster:
                span = {"from_s": min(above) + for_s / self.faster, "until_s": max(above)}
                rows.append({**span, "alert": name, "severity": "scale"})
        return rows


# What one page can say, by the recording rule that says it in a bundle.
OWN: dict[str, Callable[[ServerMetrics], float]] = {
    "model:requests_waiting:per_replica": lambda page: page.waiting or 0.0,
    "model:kv_cache_usage:avg": lambda page: page.kv_cache_usage or 0.0,
}
# The scale alerts: query, limit in data/watch.yaml, and for how long; tests hold them to the rules.
SCALE = {
    "QueueBacklog": ("model:requests_waiting:per_replica", "waiting_per_replica", 120),
    "KVCachePressure": ("model:kv_cache_usage:avg", "kv_cache_usage_limit", 300),
}


def scene(
    source: Source, config: EngineConfig, replicas: int, faster: float, base_url: str = "", key_env: str = ""
) -> Scene:  # fmt: skip
    """Emulators of the source's engine behind its single-node bundle; with a `base_url` that server, read by itself.

    Where nginx or Prometheus is not installed one emulator is loaded and read without them, and `how` says so.
    """
    model = source.case.model
    if base_url:
        target = Target(base_url, model, api_key_env=key_env or None)
        card = measure.call(target, "/models")["data"][0]
        live = Scene(replace(target, model=card["id"]), "a live server's page", faster)
        live.emulated = bool(card.get("emulated"))
        return _read_here(live)
    scratch = tempfile.TemporaryDirectory(prefix="kit-")
    folder, lost = Path(scratch.name), {PROGRAMS["edge"], PROGRAMS["prometheus"]} & set(missing())
    made = Scene(Target("http://127.0.0.1:1", model), "", faster, scratch=scratch)
    try:
        for number in range(1 if lost else replicas):
            log = folder / f"emulator-{number}.log"
            made.engines.append(measure.emulate(model, str(source.gpu), config, log, {}))
        urls = [one.launch.base_url for one in made.engines]
        if lost:
            made.how = f"one emulator's page, read here: no {' and no '.join(sorted(lost))} on this machine"
            made.target = replace(made.target, base_url=urls[0])
            return _read_here(made)
        made.stage = stage(_pointed(source, folder / "bundle", urls), {}, folder / "stage", faster)
    except BaseException:
        made.stop()
        raise
    os.environ[KEY] = made.stage.key
    blind = 'ALERTS{alertname=~"AllReplicasDown|EdgeDown"}'  # until Prometheus has found its targets
    while (len(made.stage.query("up == 1")) < replicas or made.stage.query(blind)) and made.now() < START_S:
        time.sleep(SCRAPE_MS / 1e3)
    made.begun = time.time()
    made.target = replace(made.target, base_url=made.stage.base_url, api_key_env=KEY)
    made.how = f"{replicas} emulators behind the bundle's nginx, its rules in a real Prometheus"
    return made


def _read_here(made: Scene) -> Scene:
    threading.Thread(target=made.poll, args=(made.target.base_url,), daemon=True).start()
    return made


def _pointed(source: Source, bundle: Path, urls: list[str]) -> Path:
    """The bundle with its edge and its Prometheus pointed at these engines, as one does when engines come and go."""
    try:
        render(source, "single-node", bundle)
    except UserError:  # this GPU does not hold the model on one host; edge and rules are those of any other
        render(replace(source, case=source.case.model_copy(update=SMALL)), "single-node", bundle)
    peers = [url.removeprefix("http://") for url in urls]
    lines = [f"server {peer} max_fails=3 fail_timeout=10s; # /health\n" for peer in peers]
    (bundle / "edge" / "servers-engines.conf").write_text("".join(lines), encoding="utf-8")
    targets = [{"targets": peers, "labels": {"tier": "warm", "gpu_type": source.gpu}}]
    (bundle / "monitoring" / "targets" / "engine.yml").write_text(yaml.safe_dump(targets), encoding="utf-8")
    return bundle
