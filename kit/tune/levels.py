"""What a tuning measures: the goal, an engine start, a level, the machine that gives them, the file that keeps them."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kit import metrics
from kit.errors import UserError
from kit.metrics import Requests

QUANTILES = ("mean", "p50", "p90", "p95", "p99")
LONGEST_S = 300.0  # in which the turns of a closed level are sent
SERVER = ("running_mean", "kv_cache_usage_mean", "kv_cache_usage_max", "preemptions", "prefix_hit_fraction")


@dataclass(frozen=True, slots=True)
class Goal:
    """Limits of one turn and the fraction of turns that shall meet them."""

    slo_ttft_s: float
    slo_tpot_s: float
    attainment_fraction: float = 0.9


@dataclass(frozen=True, slots=True)
class Boot:
    """One engine start: `flags` by our names (max_num_seqs ..), and the KV pool that it printed."""

    index: int  # from 1
    flags: dict[str, Any]
    max_num_seqs: int
    kv_cache_tokens: int | None = None
    start_s: float | None = None  # from start to healthy


@dataclass(frozen=True, slots=True)
class Level:
    """One measured level; None where the server does not say."""

    boot: int
    max_num_seqs: int  # of that boot
    kind: str  # closed: `concurrency` turns always ready; open: the workload with its burst
    concurrency: int | None  # closed: turns in flight; open: most that the client lets in (None: all)
    seed: int
    n: int  # turns judged
    duration_s: float
    requests_per_s: float  # completed
    offered_requests_per_s: float
    output_tokens_per_s: float
    goodput_requests_per_s: float
    slo_attainment_fraction: float
    slo_attainment_interval: tuple[float, float]
    ttft_attainment_fraction: float
    tpot_attainment_fraction: float
    ttft_s: dict[str, float | None]  # QUANTILES; closed: from the send, open: from the schedule
    tpot_s: dict[str, float | None]
    input_tokens_mean: float
    output_tokens_mean: float
    running_mean: float | None
    kv_cache_usage_mean: float | None
    kv_cache_usage_max: float | None
    preemptions: int | None
    prefix_hit_fraction: float | None
    warnings: tuple[str, ...] = ()
    kv_tokens_per_turn: float | None = None  # held by a running turn, shared ones dealt out

    @property
    def limit(self) -> int:
        """Most turns that the engine could run at once."""
        return min(self.max_num_seqs, self.concurrency or self.max_num_seqs)


class Machine(Protocol):
    """An engine that can be started with flags and measured; a later `boot` stops the one before."""

    def boot(self, flags: Mapping[str, Any], index: int) -> Boot:
        """Start the engine with these flags on top of the user's own; by our names."""
        ...

    def closed_loop(self, boot: Boot, concurrency: int, seed: int, min_turns: int) -> Level:
        """At least `min_turns` turns judged (and twice `concurrency` more) while `concurrency` are always ready."""
        ...

    def open_loop(self, boot: Boot, seed: int, max_concurrency: int | None = None) -> Level:
        """The workload with its burst; turns beyond `max_concurrency` wait in the client, first come first served."""
        ...


def judge(
    boot: Boot, kind: str, seed: int, requests: Requests, input_len: metrics.Floats, goal: Goal,
    server: Mapping[str, Any], concurrency: int | None = None, warnings: tuple[str, ...] = (),
) -> Level:  # fmt: skip
    """The level of all its requests; `server` has the keys of SERVER.

    Of a closed loop the first and the last `concurrency` sent are left out (a quarter at most): they ran while it
    filled and emptied.
    """
    closed = kind == "closed"
    if closed and concurrency:
        requests, input_len = _steady(requests, input_len, concurrency)
    n = len(requests.ok)
    if not n:
        raise UserError(f"no turn was measured at {kind} {concurrency or ''}: want a longer level")
    ttft_s = requests.ttft_s() if closed else requests.ttft_scheduled_s()
    in_ttft, in_tpot, good = (
        metrics.meets_slo(requests, *limits, from_send=closed)
        for limits in ((goal.slo_ttft_s, None), (None, goal.slo_tpot_s), (goal.slo_ttft_s, goal.slo_tpot_s))
    )
    ok, misses = requests.ok, int((~requests.ok).sum())
    at_s = requests.sent_s if closed else requests.scheduled_s
    sent_s, whole_s = float(np.nanmax(at_s) - np.nanmin(at_s)), float(np.nanmax(requests.end_s) - np.nanmin(at_s))
    span = sent_s * n / (n - 1) if closed and n > 1 else whole_s
    tokens = float(np.nansum(requests.output_tokens[ok]))
    seen = {name: metrics.summarize(v[ok], misses) for name, v in (("ttft_s", ttft_s), ("tpot_s", requests.tpot_s()))}
    values: dict[str, Any] = {
        "requests_per_s": float(ok.sum()) / span, "offered_requests_per_s": n / (sent_s or span),
        "output_tokens_per_s": tokens / span, "goodput_requests_per_s": float(good.sum()) / span,
        "slo_attainment_fraction": float(good.mean()),
        "slo_attainment_interval": metrics.wilson_interval(int(good.sum()), n),
        "ttft_attainment_fraction": float(in_ttft.mean()), "tpot_attainment_fraction": float(in_tpot.mean()),
        "input_tokens_mean": float(np.mean(input_len)), "output_tokens_mean": tokens / max(1, int(ok.sum())),
        **{name: {part: one[part] for part in QUANTILES} for name, one in seen.items()},
        **{name: server.get(name) for name in SERVER}, "warnings": warnings,
    }  # fmt: skip
    running, used, pool = (server.get("running_mean"), server.get("kv_cache_usage_mean"), boot.kv_cache_tokens)
    values["kv_tokens_per_turn"] = used * pool / running if running and pool and used is not None else None
    return Level(boot.index, boot.max_num_seqs, kind, concurrency, seed, n, span, **values)


def cut_short(turns: float, duration_s: float) -> tuple[str, ...]:
    """What a closed level says whose time was over before so many turns were sent."""
    told = f"after {LONGEST_S:g} s {turns:g} turns were not sent: fewer are judged"
    return (told,) if turns > 0 and duration_s >= LONGEST_S else ()


def _steady(requests: Requests, input_len: metrics.Floats, concurrency: int) -> tuple[Requests, metrics.Floats]:
    cut = min(concurrency, len(requests.ok) // 4)
    order = np.argsort(requests.sent_s)[cut : len(requests.ok) - cut]
    columns: dict[str, Any] = {one.name: getattr(requests, one.name) for one in fields(Requests)}
    columns = {name: values if values is None else values[order] for name, values in columns.items()}
    return Requests(**columns), input_len[order]


@dataclass(frozen=True, slots=True)
class Result:
    """What `kit tune --json` prints."""

    status: str  # resolved, unresolved or infeasible; `notes` say why
    recommended: dict[str, Any] = field(default_factory=dict)  # by our names; empty where infeasible
    engine_args: dict[str, str] = field(default_factory=dict)  # by the engine's flags
    reasons: dict[str, str] = field(default_factory=dict)  # why each recommended value, in a line
    goodput_requests_per_s: float | None = None  # open loop, on the confirming start
    slo_attainment_fraction: float | None = None
    limited_by: str = "slo"  # tpot, ttft, kv_cache, load (all values serve it alike), or slo: not even one turn
    limits: dict[str, int | None] = field(default_factory=dict)  # most turns at once by tpot, ttft, kv_cache, knee
    limits_interval: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # 90 %
    confirmed: bool = False
    notes: tuple[str, ...] = ()
    boots: int = 0
    predicted_max_num_seqs: int | None = None
    evidence: list[dict[str, Any]] = field(default_factory=list)  # every level, in order


class Store:
    """Boots and levels, appended to a JSONL file (None: kept in memory) and read again on resume."""

    def __init__(self, path: Path | None, asked: Mapping[str, Any]) -> None:
        """Refuses a file that belongs to another question than `asked`."""
        self.path, self.boots, self.levels = path, list[Boot](), list[Level]()
        records = _whole_lines(path) if path and path.exists() else []
        text = json.loads(json.dumps({"asked": dict(asked)}))
        held = records[0]["asked"] if records else text["asked"]
        if differs := sorted(key for key in {*held, *asked} if held.get(key) != text["asked"].get(key)):
            raise UserError(f"{path} holds a tuning with another {', '.join(differs)}")
        if not records:
            self._append(text)
        for record in records[1:]:
            if "flags" in record:
                self.boots.append(Boot(**record))
            else:
                record |= {name: tuple(record[name]) for name in ("slo_attainment_interval", "warnings")}
                self.levels.append(Level(**record))

    def add(self, one: Boot | Level) -> None:
        """Keep it."""
        (self.boots if isinstance(one, Boot) else self.levels).append(one)  # type: ignore[arg-type]
        self._append(asdict(one))

    def find(self, boot: int, kind: str, concurrency: int | None, seed: int) -> Level | None:
        """The level measured before, if any."""
        wanted = (boot, kind, concurrency, seed)
        return next((x for x in self.levels if (x.boot, x.kind, x.concurrency, x.seed) == wanted), None)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _whole_lines(path: Path) -> list[Any]:
    """The records of a JSONL file; a kill may leave half a line, which is closed so that the next one stands alone."""
    text, records = path.read_text(encoding="utf-8"), []
    if text and not text.endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")
    for line in text.splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
