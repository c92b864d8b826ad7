"""Who is probed: an OpenAI-compatible server over HTTP, or a machine in virtual time."""

import http.client
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kit.calibrate.probes import COLUMNS, Measured
from kit.catalog import ModelSpec
from kit.catalog.models import normalize
from kit.errors import UserError
from kit.loadgen import Level, Options, Target, measure
from kit.scheduler import SchedulerConfig, StepTime
from kit.simulator import Simulation, SimulationConfig
from kit.simulator.answers import columns
from kit.telemetry import read_page
from kit.workload import Session

ASK_TIMEOUT_S = 10.0
FAILING_FRACTION = 0.1  # a probe of which more fails says nothing
RECORDED = ("session", "turn", "input_len", "sent_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens")


class LiveServer:
    """A server over HTTP; raises UserError where it cannot be reached or serves another model."""

    engine: str | None = None  # these two, where its metrics page tells
    kv_cache_tokens: float | None = None

    def __init__(self, target: Target, model: ModelSpec, log: Callable[[str], object] = sys.stderr.write) -> None:
        try:
            cards = list(json.loads(_get(target, "/v1/models"))["data"])
        except (json.JSONDecodeError, LookupError, TypeError):
            raise UserError(f"{target.base_url}/v1/models: not a list of models") from None
        names = normalize(target.model), normalize(model.key)
        alike = [one for one in cards if normalize(one["id"]) in names]
        card = next((one for one in cards if one["id"] == target.model), alike[0] if alike else None)
        if card is None:
            served = ", ".join(repr(one["id"]) for one in cards) or "no model"
            raise UserError(f"{target.base_url} serves {served}, not {target.model!r}")
        self.target, self.log, self.max_model_len = replace(target, model=card["id"]), log, card.get("max_model_len")
        self.kind = "emulator" if card.get("emulated") else "live"
        with suppress(UserError):
            if page := read_page(_get(target, "/metrics")):
                self.engine, self.kv_cache_tokens = page.engine, page.kv_cache_tokens

    def measure(self, level: Level) -> Measured:
        """One probe through the load generator of `kit load`; raises UserError where nothing came back."""
        with tempfile.TemporaryDirectory(prefix="kit-") as folder:
            summary = measure(self.target, [level], Options(log=self.log), Path(folder) / "run")[0]
            lines = (Path(folder) / "run" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        done = [row for row in map(json.loads, lines) if row["ok"]]
        if summary["failed"] > FAILING_FRACTION * len(lines) or not done:
            lost = f"{summary['failed']} requests of probe {level.name} failed: {summary['failures']}"
            raise UserError(f"{self.target.base_url}: {lost}; probes before it are kept")
        rows = {name: [row[theirs] for row in done] for name, theirs in zip(COLUMNS, RECORDED, strict=True)}
        rows["session"] = list(map(float, rows["session"]))
        rows["prompt_tokens"] = [row["prompt_tokens"] or row["input_len"] for row in done]
        told = {name: summary[name] for name in ("verdict", "verdict_reasons", "failures")}
        told |= {name: summary["server"][name] for name in ("prefix_hit_fraction", "running", "waiting")}
        return Measured(level.name, level.slots, rows, summary["duration_s"], told)


class VirtualServer:
    """A machine in virtual time: scheduler limits and step times, such as `kit.emulator.hide` draws."""

    kind, engine = "virtual", None

    def __init__(self, limits: SchedulerConfig, step_time: StepTime, turnaround_s: float = 0.0005) -> None:
        self.limits, self.step_time, self.turnaround_s = limits, step_time, turnaround_s
        self.max_model_len, self.kv_cache_tokens = limits.max_model_len, limits.kv_blocks * limits.block_size

    def measure(self, level: Level) -> Measured:
        """The probe as a client would see it."""
        sim = Simulation(SimulationConfig(self.limits), self.step_time, level.duration_s or np.inf)
        turns = [replace(one.turns[0], pause_after_s=self.turnaround_s, compact_to=0) for one in level.sessions]
        slots = [Session(slot, 0.0, turns[slot :: level.slots]) for slot in range(level.slots or 0) if turns[slot:]]
        table = np.sort(columns(sim.run(slots or level.sessions)), order=["arrival_s", "key"])
        if level.slots:  # each request is a session of its own
            table["key"], table["turn"] = np.arange(len(table)), 0
        names = ("key", "turn", "input_len", "arrival_s", "first_s", "end_s", "input_len", "output_len")
        rows = {ours: table[theirs].tolist() for ours, theirs in zip(COLUMNS, names, strict=True)}
        return Measured(level.name, level.slots, rows, float(table["end_s"].max()), {"verdict": "VALID"})


Server = LiveServer | VirtualServer


def _get(target: Target, path: str) -> Any:
    """The text at a path of the server; raises UserError where there is none."""
    url = target.root + path
    headers = {"Authorization": f"Bearer {os.environ[target.api_key_env]}"} if target.api_key_env else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=ASK_TIMEOUT_S) as answer:
            return answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot reach {target.base_url}: {getattr(error, 'reason', error)}") from None
