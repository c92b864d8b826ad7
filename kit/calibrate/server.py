"""Who is probed: an OpenAI-compatible server over HTTP, or a machine in virtual time."""

import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

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
RECORDED = dict(zip(COLUMNS, ("session", "turn", "input_len", "sent_s", "first_token_s", "last_token_s",
                              "prompt_tokens", "output_tokens"), strict=True))  # fmt: skip


class Server(Protocol):
    """What calibrate asks of one."""

    kind: str  # live, emulator or virtual
    engine: str | None  # that its metrics page speaks for
    max_model_len: int | None
    kv_cache_tokens: float | None  # None: it does not tell

    def measure(self, level: Level) -> Measured:
        """The probe's requests as they went."""
        ...


class LiveServer:
    """A server over HTTP; refuses one that cannot be reached or serves another model than `model` (served so named)."""

    def __init__(self, target: Target, model: ModelSpec, log: Callable[[str], object] = sys.stderr.write) -> None:
        cards = json.loads(_get(target, "/v1/models")).get("data", [])
        card = next((one for one in cards if _same(one["id"], target.model, model)), None)
        if card is None:
            names = ", ".join(repr(one["id"]) for one in cards)
            raise UserError(f"{target.base_url} serves {names or 'no model'}, not {target.model!r}")
        self.target, self.log = replace(target, model=card["id"]), log
        self.kind = "emulator" if card.get("emulated") else "live"
        self.max_model_len: int | None = card.get("max_model_len")
        page = _page(target)
        self.engine, self.kv_cache_tokens = page and page.engine, page and page.kv_cache_tokens

    def measure(self, level: Level) -> Measured:
        """One probe through the load generator of `kit load`; raises UserError where nothing came back."""
        with tempfile.TemporaryDirectory(prefix="kit-") as folder:
            summary = measure(self.target, [level], Options(log=self.log), Path(folder) / "run")[0]
            lines = (Path(folder) / "run" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        done = [row for row in map(json.loads, lines) if row["ok"]]
        if not done:
            raise UserError(
                f"{self.target.base_url}: no request of probe {level.name} came back: {summary['failures']}"
            )
        rows = {name: [row[theirs] for row in done] for name, theirs in RECORDED.items()}
        asked = zip(rows["prompt_tokens"], rows["asked_len"], strict=True)
        rows["prompt_tokens"] = [told or length for told, length in asked]
        rows["session"] = [float(key) for key in rows["session"]]
        told = {name: summary[name] for name in ("verdict", "verdict_reasons", "failures")}
        hits = {"prefix_hit_fraction": summary["server"]["prefix_hit_fraction"]}
        return Measured(level.name, level.slots, rows, summary["duration_s"], told | hits)


class VirtualServer:
    """A machine in virtual time: scheduler limits and step times, such as `kit.emulator.hide` draws."""

    kind, engine = "virtual", None

    def __init__(self, limits: SchedulerConfig, step_time: StepTime, turnaround_s: float = 0.0005) -> None:
        self.limits, self.step_time, self.turnaround_s = limits, step_time, turnaround_s
        self.max_model_len: int | None = limits.max_model_len
        self.kv_cache_tokens: float | None = limits.kv_blocks * limits.block_size

    def measure(self, level: Level) -> Measured:
        """The probe as a client would see it."""
        config = SimulationConfig(self.limits, request_s=getattr(self.step_time, "request_s", None))
        sim = Simulation(config, self.step_time).run(self._played(level))
        table = columns(sim)
        table = table[np.lexsort((table["turn"], table["key"], table["arrival_s"]))]
        table = table[table["arrival_s"] <= (level.duration_s or np.inf)]
        if level.slots:  # each request is a session of its own
            table["key"], table["turn"] = np.arange(len(table)), 0
        taken = (
            table["key"],
            table["turn"],
            table["input_len"],
            *(table[n] for n in ("arrival_s", "first_s", "end_s")),
        )
        rows = dict(zip(COLUMNS, (*taken, table["input_len"], table["output_len"]), strict=True))
        listed = {name: values.tolist() for name, values in rows.items()}
        return Measured(level.name, level.slots, listed, float(table["end_s"].max()), {"verdict": "VALID"})

    def _played(self, level: Level) -> list[Session]:
        """Slots as sessions that start anew with each turn."""
        if not level.slots:
            return level.sessions
        made = []
        for slot in range(level.slots):
            each = level.sessions[slot :: level.slots]
            turns = [replace(one.turns[0], pause_after_s=self.turnaround_s, compact_to=0) for one in each]
            made += [Session(slot, 0.0, turns)] * bool(turns)
        return made


def _same(served: str, asked: str, model: ModelSpec) -> bool:
    """Whether a served name is the asked one, or another name of the same model."""
    if served == asked or Path(served).name == Path(asked).name:
        return True
    return normalize(served) in (normalize(asked), normalize(model.key))


def _page(target: Target) -> Any:
    try:
        return read_page(_get(target, "/metrics"))
    except UserError:
        return None


def _get(target: Target, path: str) -> str:
    """The text at a path of the server; raises UserError where there is none."""
    key = os.environ.get(target.api_key_env or "", "")
    url = target.base_url.rstrip("/").removesuffix("/v1") + path
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot reach {target.base_url}: {getattr(error, 'reason', error)}") from None
