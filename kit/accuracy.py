"""How wrong the model was where somebody measured, and how many sessions a replica takes where nobody did."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any

import numpy as np

from kit import budget, catalog
from kit.catalog.paths import DATA, load_yaml
from kit.emulator import hide
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.metrics import PASSING_ATTAINMENT
from kit.predict import Ask, predict
from kit.scenario import Scenario
from kit.simulator.answers import columns
from kit.workload import Session

Row = dict[str, Any]
GRAIN = 0.03  # of a count of sessions, as a fraction


def left_out(engine: str) -> list[Row]:
    """Median errors and 90 % factors of published runs that the fit did not see, by how much data was near them."""
    data = json.loads((DATA / "coefficients" / f"{engine}.json").read_text(encoding="utf-8"))
    return [
        {"engine": engine, "data near it": basis, "runs": error["tpot_rows"]}
        | {"TPOT off": f"{error['tpot']:.1%}", "TTFT off": f"{error['ttft']:.1%}"}
        | {f"{name.upper()} 90 % x/÷": data["factor_90"][basis][name] for name in ("tpot", "ttft")}
        for basis, error in data["median_error_left_out"].items()
    ]


def published() -> Iterator[Row]:
    """The runs of data/published_runs.yaml with predicted over published TTFT and TPOT, or why nothing is predicted."""
    for run in load_yaml(DATA / "published_runs.yaml"):
        flags = {"engine": run["engine"], "engine_version": run["version"], "quantization": run["quantization"]}
        config = EngineConfig(**flags, gpu_count=run["gpus"])
        lengths = {name: run[name] for name in ("input_tokens", "output_tokens", "concurrency")}
        try:
            found = predict(catalog.model(run["model"]), catalog.gpu(run["gpu"]), config, Ask(**lengths))
        except UserError as refusal:  # our memory model has it that this does not start
            yield {**run, "refused": str(refusal)}
            continue
        for quantity in ("ttft_s", "tpot_s"):
            low, high = found["intervals"][f"{quantity}_mean"]
            yield {**run, "quantity": quantity, "published_s": run[quantity], "predicted_s": found[quantity]["mean"],
                   "interval_s": [low, high], "inside": low <= run[quantity] <= high, "basis": found["basis"],
                   "ratio": found[quantity]["mean"] / run[quantity]}  # fmt: skip


def hidden(one: budget.Machine, seed: int) -> budget.Machine:
    """The machine of that seed (`kit emulate --truth SEED`) in the place of a modelled one."""
    limits, steps = hide(seed, one.limits, one.steps)
    return replace(one, limits=limits, steps=steps)


def outcome(one: budget.Machine, sessions: Sequence[Session]) -> dict[str, float]:
    """TTFT p50 and TPOT mean of sessions on a machine, in s."""
    table = columns(one.play(sessions))
    rest = table["output_len"] - 1
    tpot_s = (table["end_s"] - table["first_s"])[rest > 0] / rest[rest > 0]
    return {"TTFT p50": float(np.median(table["first_s"] - table["arrival_s"])), "TPOT mean": float(tpot_s.mean())}


def capacity(one: budget.Machine, case: Scenario, slo: budget.Slo) -> tuple[int, int, int]:
    """Most sessions at once within the limits: at the slow end of a replica's errors, as modelled, at the fast end.

    0 where one session alone misses them; budget.MOST_STREAMS where more would still be kept.
    """

    @cache
    def shares(count: int) -> tuple[float, float, float]:
        row = budget.judge(one, case, count, slo)
        slow, fast = row["slo_attainment_interval"]
        return slow, row["slo_attainment_fraction"], fast

    def most(end: int) -> int:
        good, bad = 0, 1
        while bad <= budget.MOST_STREAMS and shares(bad)[end] >= PASSING_ATTAINMENT:
            good, bad = bad, 2 * bad
        if bad > budget.MOST_STREAMS:
            return budget.MOST_STREAMS
        while bad - good > max(1, GRAIN * good):
            middle = (good + bad) // 2
            good, bad = (middle, bad) if shares(middle)[end] >= PASSING_ATTAINMENT else (good, middle)
        return good

    return most(0), most(1), most(2)


def replicas(sessions: int, each: int) -> int | None:
    """Replicas for that many sessions; None where one keeps the limits for nobody."""
    return ceil(sessions / each) if each else None
