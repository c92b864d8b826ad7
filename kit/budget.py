"""Where the seconds of a turn go, and which GPUs keep a turn's limits: those first, then the cheapest."""

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from kit import prices
from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError, unknown
from kit.metrics import PASSING_ATTAINMENT
from kit.scenario import COUNTS, Scenario, hold, parallel
from kit.scheduler import SchedulerConfig
from kit.simulator import Simulation, SimulationConfig, replica
from kit.simulator.answers import columns
from kit.steptime import Fitted, fitted
from kit.workload import Session, Turn

SPREAD = 0.2  # half width of token counts around a scenario's own, as a fraction
JUDGED_TURNS = 400  # at least, over all streams
MOST_STREAMS, MOST_GPUS = 512, 64  # of one replica; of one candidate
ROOM = 2  # a replica is asked for at most so many times the sessions that it holds at their longest context
# Stages up to the second token: column of `turns`, and which factor of the errors is its own.
STAGES = {"API and tokeniser": ("api_s", 0), "queue": ("queue_s", 0), "prefill": ("prefill_s", 0),
          "first decode step": ("tpot_s", 1)}  # fmt: skip
Row = dict[str, Any]
Slo = Mapping[str, Any]


def preset(name: str) -> dict[str, Any]:
    """The limits of a kind of agent, or the network, of data/slo.yaml."""
    known = load_yaml(DATA / "slo.yaml")
    if name not in known:
        raise unknown("SLO preset", name, known, shown=len(known))
    return dict(known[name])


@dataclass(frozen=True)
class Machine:
    """One replica as the simulator plays it, with what is known of its errors."""

    gpu: GpuSpec
    config: EngineConfig
    limits: SchedulerConfig
    steps: Any  # step_s, decode_line and request_s
    basis: Fitted

    def play(self, sessions: Sequence[Session], *, keep_kv: bool = True) -> Simulation:
        """The sessions to their end, API and tokeniser included."""
        config = SimulationConfig(self.limits, keep_kv=keep_kv)
        return Simulation(config, self.steps).run(sessions)


def machine(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, basis: Fitted | None = None) -> Machine:
    """The replica of that model on config.gpu_count GPUs; raises UserError where it does not start."""
    config = parallel(spec, config)
    basis = basis or fitted(spec, gpu, resolve(config, spec, gpu))
    limits, steps, _ = replica(spec, gpu, config, basis)
    return Machine(gpu, config, limits, steps, basis)


def streams(case: Scenario, count: int, seed: int = 0) -> list[Session]:
    """`count` conversations that are always under way: each stream begins anew where one ended, each at another turn.

    Prompts and answers grow as the scenario says, varied by SPREAD; there is no pause, so every session is active.
    """
    made, kept = [], 2 + max(6, -(-JUDGED_TURNS // count))
    for key in range(count):
        rng = Random(f"{seed} {key}")
        sizes = conversation(case, rng, begin=key % case.turns)
        made.append(Session(key, 0.0, [turn for turn, _ in zip(sizes, range(kept), strict=False)]))
    return made


def conversation(case: Scenario, rng: Random, begin: int = 0) -> Iterator[Turn]:
    """The turns of conversations one after the other; the first one is entered at turn `begin`."""
    added, output = case.tokens_added_per_turn, case.output_tokens_per_turn
    while True:
        prompt, held = case.input_tokens_first_turn + begin * (added + output), 0
        for turn in range(begin, case.turns):
            new, out = (max(1, round(n * rng.uniform(1 - SPREAD, 1 + SPREAD))) for n in (prompt, output))
            held += new + out
            if held > case.context_tokens and turn > begin:
                break
            yield Turn(new, out, compact_to=None if turn > begin else 0)
            prompt = added
        begin = 0


def turns(one: Machine, sim: Simulation) -> pd.DataFrame:
    """A row for each judged turn with its stages in s: those after a stream's first, while all streams are busy."""
    table = pd.DataFrame(columns(sim))
    busy_s = table.loc[table["last_turn"] == 1, "arrival_s"].min()
    table = table[(table["turn"] > 0) & (table["arrival_s"] <= busy_s)]
    at_once = table["session"].nunique()
    api_s = np.array([one.steps.request_s(int(tokens), at_once) for tokens in table["input_len"]])
    stages = {"ttft_s": table["first_s"] - table["arrival_s"], "e2el_s": table["end_s"] - table["arrival_s"]}
    api_s = np.minimum(api_s, table["admitted_s"] - table["arrival_s"])
    stages |= {"api_s": api_s, "queue_s": table["admitted_s"] - table["arrival_s"] - api_s}
    stages |= {"prefill_s": table["first_s"] - table["admitted_s"], "decode_s": table["end_s"] - table["first_s"]}
    return pd.DataFrame(table.assign(**stages, tpot_s=stages["decode_s"] / (table["output_len"] - 1).clip(lower=1)))


def attainment(table: pd.DataFrame, slo: Slo, slower: tuple[float, float] = (1.0, 1.0)) -> float:
    """Share of turns that keep every limit, were first tokens and further ones that many times as slow."""
    ttft_s, decode_s = table["ttft_s"] * slower[0], table["decode_s"] * slower[1]
    values = {"ttft_s": ttft_s, "tpot_s": table["tpot_s"] * slower[1], "e2el_s": ttft_s + decode_s}
    good = [value <= slo[name] for name, value in values.items() if slo.get(name)]
    return float(np.all(good, axis=0).mean()) if good else 1.0


def judge(one: Machine, case: Scenario, count: int, slo: Slo) -> Row:
    """What `count` streams get of one replica, with 90 % intervals; a refused turn keeps no limit."""
    sim = one.play(streams(case, count))
    table = turns(one, sim)
    if table.empty:
        raise UserError(f"{one.gpu.key}: {'; '.join(sim.refusals) or 'no turn'}: nothing to judge")
    served = len(table) / max(1, len(table) + len(sim.refused))
    basis, e2el_s = one.basis, float(table["e2el_s"].mean())
    factors = basis.ttft_factor, basis.tpot_factor
    worst, best = (attainment(table, slo, (f**sign, g**sign)) for sign in (1, -1) for f, g in [factors])
    shown = {name: {"mean": float(table[name].mean()), "p50": float(table[name].median())}
             | {"p90": float(table[name].quantile(0.9))} for name in ("ttft_s", "tpot_s", "e2el_s")}  # fmt: skip
    rates = {"output_tokens_per_s": count * float(table["output_len"].mean()) / e2el_s}
    return {
        "gpu": one.gpu.key, "gpu_count": one.config.gpu_count, "streams": count, **shown, **rates,
        "intervals": basis.intervals({**shown, **rates}), "slo_attainment_fraction": served * attainment(table, slo),
        "slo_attainment_interval": [served * worst, served * best], "basis": basis.basis, "factors": list(factors),
        "warnings": list(basis.warnings), "turns": len(table),
    }  # fmt: skip


def candidate(case: Scenario, spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, slo: Slo) -> Row | None:
    """The fewest GPUs of one kind that keep the limits for all sessions, else what keeps them best.

    Tried are replicas of one, two, four and eight GPUs that keep the limits for one session alone; where none does,
    the fewest that hold the sessions. Sessions are dealt evenly. None where MOST_GPUS do not hold them.
    """
    alone = {}
    for size in COUNTS:
        flags = replace(config, gpu_count=size)
        held = hold(spec, gpu, flags, case.demand()).memory
        if held.num_blocks() > 0:
            with suppress(UserError):
                one = machine(spec, gpu, flags)
                alone[size] = one, held.concurrency(case.context_tokens), met(judge(one, case, 1, slo))
    able = {size: one for size, one in alone.items() if one[2]} or alone
    best: Row | None = None
    for total in (2**power for power in range(MOST_GPUS.bit_length())):
        for size, (one, sessions, keeps) in able.items():
            count = -(-case.sessions * size // total)
            if size > total or count > min(MOST_STREAMS, ROOM * sessions):
                continue
            found = judge(one, case, count, slo)
            found |= {"replicas": total // size, "gpus": total, "meets": met(found)}
            if best is None or found["slo_attainment_fraction"] > best["slo_attainment_fraction"]:
                best = found
            if not keeps:
                return best
        if best is not None and best["meets"]:
            break
    return best


def met(row: Row) -> bool:
    """Whether 95 % of the turns keep every limit."""
    return bool(row["slo_attainment_fraction"] >= PASSING_ATTAINMENT)


def priced(row: Row, book: list[prices.GpuPrice]) -> Row:
    """The row with the cheapest on-demand price of its GPUs, its provider and date; None where none is known."""
    found = prices.find(row["gpu"], "on_demand", book)
    usd = found and found.usd_per_hour("on_demand")
    told = found.told(dt.date.today()) if found else dict.fromkeys(("provider", "date", "source", "is_stale"))
    told = {"price": {name: told[name] for name in ("provider", "date", "source", "is_stale")}}
    per_million = usd and usd * row["gpus"] / (row["replicas"] * row["output_tokens_per_s"] * 3600 / 1e6)
    return {**row, "usd_per_hour": usd and usd * row["gpus"], "usd_per_million_output_tokens": per_million, **told}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Those that keep the limits by price, then the others by how well they keep them."""
    return sorted(rows, key=lambda row: (not row["meets"], (row["usd_per_hour"] or inf) if row["meets"] else 0.0,
                                         -row["slo_attainment_fraction"]))  # fmt: skip


def phases(spec: ModelSpec, gpu: GpuSpec, prompt: int = 8192, rows: int = 1, context: int = 4096) -> Row:
    """Prefill and decode of one GPU alone, in tokens per s, with the datasheet's rates that bound them."""
    config = EngineConfig()
    basis = fitted(spec, gpu, resolve(config, spec, gpu))
    steps = machine(spec, gpu, config, basis).steps
    prefill, decode = prompt / steps.step_s([(prompt, 0)], 0, 0), rows / steps.step_s((), rows, rows * context)
    rates = {"bf16 TFLOP/s": gpu.flops_per_s("bf16") / 1e12, "TB/s": gpu.memory_bandwidth_bytes_per_s / 1e12}
    return {"gpu": gpu.key, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, **rates,
            "factors": [basis.ttft_factor, basis.tpot_factor], "basis": basis.basis}  # fmt: skip


def task(one: Machine, case: Scenario, *, keep_kv: bool = True) -> Row:
    """Seconds that one task of a scenario spends on first tokens and on the rest of its answers, alone."""
    sizes = conversation(case, Random(0))
    made = [replace(turn, pause_after_s=1.0) for turn, _ in zip(sizes, range(case.turns), strict=False)]
    table = columns(one.play([Session(0, 0.0, made)], keep_kv=keep_kv))
    ttft_s = float((table["first_s"] - table["arrival_s"]).sum())
    decode_s = float((table["end_s"] - table["first_s"]).sum())
    return {"calls": len(table), "ttft_s": ttft_s, "decode_s": decode_s, "share": ttft_s / (ttft_s + decode_s)}


def waterfall(tables: Mapping[str, pd.DataFrame], factors: Sequence[float]) -> list[Row]:
    """Stages of a mean turn up to its second token, one after the other, in ms; a group for each table of turns."""
    rows = []
    for group, table in tables.items():
        at = 0.0
        for label, (column, kind) in STAGES.items():
            took = 1e3 * float(table[column].mean())
            around = [at + took / factors[kind], at + took * factors[kind]]
            rows.append({"label": label, "group": group, "start": at, "end": at + took, "interval": around,
                         "text": f"{took:,.1f} ms", "took": took})  # fmt: skip
            at += took
    return rows


def hardware(row: Row) -> str:
    """Replicas and GPUs of a row as text."""
    several = f"{row['replicas']} x " if row["replicas"] > 1 else ""
    return f"{several}{row['gpu_count']}x {row['gpu']}"


def sentence(row: Row) -> str:
    """A candidate in a line."""
    low, high = row["slo_attainment_interval"]
    share = f"{row['slo_attainment_fraction']:.0%} of the turns in time ({low:.0%} to {high:.0%})"
    usd = f"{row['usd_per_hour']:.2f} USD/h" if row["usd_per_hour"] else "no price known"
    return f"{'keeps' if row['meets'] else 'misses'} the limits: {hardware(row)}, {share}, {usd}"


def shown(rows: Sequence[Row]) -> list[Row]:
    """The shortlist as a table: modelled times in ms with their intervals, quoted prices with their dates."""
    return [
        {"GPUs": hardware(row), "in time": f"{row['slo_attainment_fraction']:.0%}"}
        | {"90 %": "{:.0%} to {:.0%}".format(*row["slo_attainment_interval"])}
        | {"TTFT p90 ms": row["ttft_s"]["p90"] * 1e3, "TPOT p90 ms": row["tpot_s"]["p90"] * 1e3}
        | {"USD/h (quoted)": row["usd_per_hour"] and f"{row['usd_per_hour']:.2f}"}
        | {"data": row["basis"], "provenance": "modelled"}
        for row in rows
    ]
