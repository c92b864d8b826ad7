"""Fit data/coefficients/*.json to published measurements and say how wrong they are on groups left out.

KIT_SHARED=<folder with ground_truth/> python benchmarks/fit_steptime.py [--scan]
"""

import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from closed_loop import Limits, Load, Play
from serving_rows import FILES, Row, load
from shrinkage import GROUPS, ROWS_PER_GROUP, Design, Effect

from kit import catalog
from kit.engine_config import EngineConfig, engine_data, resolve, version_tuple
from kit.errors import UserError
from kit.memory import plan
from kit.scheduler.engines import POLICIES
from kit.steptime.model import StepTime
from kit.steptime.work import work

ERRORS = Path(__file__).resolve().parents[1] / "runs" / "steptime_errors.npz"
FOLDER = Path(__file__).resolve().parents[1] / "data" / "coefficients"
# Prior of each coefficient: where physics or other projects' fits put it, and its width in log space.
PRIOR = {
    "read": (1.15, 0.5), "read_e": (1.3, 0.5), "kv": (1.15, 0.5), "kv8": (1.0, 0.5),
    "gemm_bf16": (1.5, 0.5), "gemm_fp8": (1.8, 0.5), "gemm_fp4": (2.4, 0.5), "gemm_e": (3.0, 0.5), "attn": (1.6, 0.5),
    "reduce": (5e-6, 1.0), "reduce_hop": (2e-6, 1.0), "link": (1.5, 0.5),
    "fixed": (1e-3, 1.0), "layer": (2.5e-5, 1.0), "moe_layer": (1.5e-5, 1.0),
    "index_layer": (2e-5, 1.0), "state_layer": (1e-5, 1.0), "row": (1.5e-5, 1.0),
    "prefill": (3e-3, 1.0), "prefill_layer": (5e-5, 1.0),
    "api": (8e-3, 1.0), "token": (1e-6, 1.0), "stream": (3e-4, 1.0),
}  # fmt: skip
# First versions of eras. They part scheduling generations, and with them the harnesses that measured them: rows do
# not tell the two apart.
ERAS = {"vllm": ("0.0.0", "0.8.0", "0.11.0", "0.14.0"), "sglang": ("0.0.0", "0.5.8"),
        "tensorrt-llm": ("0.0.0", "1.1.0", "1.3.0")}  # fmt: skip
# Lengths in random-length benchmarks vary; one harness sent equal lengths, which keeps the streams of a prefill-first
# scheduler in step: its TTFT grows with the whole batch.
SPREAD = 0.1
EQUAL_LENGTHS = {("sglang", 0)}
NO_TTFT = {("tensorrt-llm", "1.0.0")}  # one stream in each of these runs waits for a slot: TTFT grows with the output


def era(row: Row) -> int:
    """Index of the row's era; rows without a version count as the newest that the kit knows."""
    version = version_tuple(row.version or str(engine_data(row.engine)["newest"]))
    return sum(version_tuple(first) <= version for first in ERAS[row.engine]) - 1


def _family(row: Row) -> str:
    return catalog.model(row.model).model_type


def effects() -> list[Effect]:
    """What makes one row's coefficients differ from another's."""
    engine = lambda row: row.engine  # noqa: E731
    own_era = lambda row: (row.engine, era(row))  # noqa: E731
    architecture = lambda row: catalog.gpu(row.gpu).architecture  # noqa: E731
    loose = (*GROUPS["request"], "prefill", "prefill_layer")
    host = (("step", 0.3), ("row", 0.5), ("reduce", 0.3), ("cmp", 0.1), ("api", 2.8), ("token", 4.0), ("stream", 2.0))
    kernels = ("mem", "cmp", "step", "moe")
    tables = [
        ("engine", engine, [(name, 0.5 if name in loose else 0.15) for name in PRIOR]),
        ("era", own_era, host),
        ("architecture", architecture, [(n, 0.4) for n in ("mem", "cmp", "link", "host", "request", "moe")]),
        ("gpu", lambda row: row.gpu, [(n, 0.1) for n in ("mem", "cmp", "link", "host", "request")]),
        ("family", _family, [(n, 0.3) for n in kernels]),
        ("own_family", lambda row: (row.engine, _family(row)), [(n, 0.3) for n in kernels]),
        ("expert_parallel", lambda row: row.engine if row.ep > 1 else None,
         [(n, 0.3) for n in ("moe", "step", "row", "api")]),
    ]  # fmt: skip
    return [Effect(name, level, group, width) for name, level, groups in tables for group, width in groups]


class Case:
    """One row with everything that its simulation needs."""

    def __init__(self, row: Row) -> None:
        model, gpu = catalog.model(row.model), catalog.gpu(row.gpu)
        config = resolve(EngineConfig(engine=row.engine, gpu_count=row.tp, quantization=row.quantization), model, gpu)
        self.row, self.work, self.config = row, work(model, gpu, config), config
        self.pool_tokens = plan(model, gpu, config).kv_cache_tokens()

    def bins(self, coefficients: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """What the row's load makes of these coefficients."""
        row, step = self.row, StepTime(self.work, coefficients)
        mixed = POLICIES[row.engine].get("mixed_steps", True)
        limits = Limits(self.config.max_num_batched_tokens, self._rows(), mixed)
        spread = 0.0 if (row.engine, era(row)) in EQUAL_LENGTHS else SPREAD
        load = Load(row.concurrency or 0, row.isl, row.osl, spread, 10 * (row.concurrency or 20))
        if row.concurrency is None:
            gaps = np.random.default_rng(1).exponential(1 / row.request_rate, load.total)
            load.arrivals = np.cumsum(gaps).tolist()
        return Play(step.seconds, step.decode_line, load, limits).bins()

    def _rows(self) -> int:
        """Requests that run at once: the pool counted with 8-bit caches where weights have 8 bits or fewer.

        Measured TTFT shows no queue where a 16-bit cache would have one.
        """
        row = self.row
        tokens = self.pool_tokens * (2 if self.work.eight_bit else 1)
        each = row.isl + row.osl * (1.0 if "reserve_own_output_fraction" in POLICIES[row.engine] else 0.6)
        return max(1, min(self.config.max_num_seqs, int(max(tokens, 2 * each) / each)))


def cases() -> tuple[list[Case], Counter[str]]:
    """Rows that can be resolved, and the reasons for the others."""
    rows, dropped = load()
    made = []
    for row in rows:
        if any(row.engine == engine and (row.version or "").startswith(version) for engine, version in NO_TTFT):
            row = replace(row, ttft_s=None)
        try:
            made.append(Case(row))
        except UserError as error:
            dropped[str(error)] += 1
    return made, dropped


def fit(made: list[Case], chosen: list[Effect], passes: int = 3) -> tuple[Design, np.ndarray]:
    """The fit, with schedules simulated again under each pass's coefficients."""
    each = [{name: prior[0] for name, prior in PRIOR.items()}] * len(made)
    x = None
    for _ in range(passes):
        bins = [case.bins(c) for case, c in zip(made, each, strict=True)]
        design = Design([case.row for case in made], [case.work for case in made], bins, PRIOR, chosen)
        x = design.solve(x)
        c = design.coefficients(x)
        each = [{name: float(one[i]) for name, one in c.items()} for i in range(len(made))]
    return design, x


def leave_out(design: Design, x: np.ndarray, key) -> np.ndarray:
    """Log errors (TPOT, TTFT) of each row when all rows of its key are left out of the fit."""
    keys = [key(row) for row in design.rows]
    errors = np.full((2, len(keys)), np.nan)
    for one in sorted(set(keys), key=str):
        out = np.array([other == one for other in keys])
        without = design.solve(x, ~out, steps=5)
        for kind, (value, _) in enumerate(design.predict(without)):
            errors[kind, out] = np.log(value[out] / design.seen[kind][out])
    return errors


def describe(design: Design, errors: np.ndarray, title: str, *, groups: bool = False) -> None:
    """Median absolute errors by engine, and by group."""
    rows = design.rows
    for engine in ERAS:
        mine = np.array([row.engine == engine for row in rows])
        print(
            f"{title:28s} {engine:13s} n {mine.sum():4d} "
            f"TPOT {_percent(errors[0][mine])} TTFT {_percent(errors[1][mine])}"
        )
    if groups:
        for group, count in sorted(Counter(row.group for row in rows).items()):
            mine = np.array([row.group == group for row in rows])
            bias = [np.nanmedian(e[mine]) if np.isfinite(e[mine]).any() else np.nan for e in errors]
            print(f"   {' '.join(group):44s} n {count:4d} TPOT {_percent(errors[0][mine])} ({bias[0]:+.2f}) "
                  f"TTFT {_percent(errors[1][mine])} ({bias[1]:+.2f})")  # fmt: skip
    sys.stdout.flush()


def _percent(errors: np.ndarray) -> str:
    errors = errors[np.isfinite(errors)]
    return f"{100 * np.median(np.abs(np.expm1(errors))):5.1f} %" if len(errors) else "    -  "


BASES = ("measured", "transfer", "new_gpu", "new_family", "new")
COVERAGE = 0.90


def errors_by_basis(design: Design, x: np.ndarray) -> dict[str, np.ndarray]:
    """Log errors (TPOT, TTFT) of rows as they would be with less and less data near them; NaN where not so."""
    keys = {
        "measured": lambda row: (*row.group, row.tp, row.quantization),
        "transfer": lambda row: row.group,
        "new_gpu": lambda row: (row.engine, row.gpu),
        "new_family": lambda row: (row.engine, row.family),
    }
    made = {basis: leave_out(design, x, key) for basis, key in keys.items()}
    made["new"] = _without_either(design, x)
    made["group"] = made["transfer"].copy()
    rows = design.rows
    for errors in made.values():
        errors[:, [refused(row) for row in rows]] = np.nan
    for basis, errors in made.items():
        for i, row in enumerate(rows):
            if basis in keys and not _is(basis, row, [o for o in rows if keys[basis](o) != keys[basis](row)]):
                errors[:, i] = np.nan
    return made


def refused(row: Row) -> bool:
    """Whether the kit refuses the row's engine version: evidence for a GPU, but no case to predict."""
    return version_tuple(row.version or "99.0") < version_tuple(str(engine_data(row.engine)["first"]))


def _is(basis: str, row: Row, rest: list[Row]) -> bool:
    """Whether the rest of the rows leaves the row in that basis."""
    near = [other for other in rest if other.engine == row.engine and not refused(other)]
    family = any(_family(other) == _family(row) for other in near)
    gpu = any(other.gpu == row.gpu for other in near)
    group = any(other.gpu == row.gpu and _family(other) == _family(row) for other in near)
    return {"measured": group, "transfer": family and gpu and not group, "new_gpu": family and not gpu,
            "new_family": gpu and not family}[basis]  # fmt: skip


def _without_either(design: Design, x: np.ndarray) -> np.ndarray:
    rows = design.rows
    errors = np.full((2, len(rows)), np.nan)
    for engine, family, gpu in sorted({row.group for row in rows}):
        out = np.array([row.engine == engine and (row.family == family or row.gpu == gpu) for row in rows])
        mine = np.array([row.group == (engine, family, gpu) for row in rows])
        without = design.solve(x, ~out, steps=5)
        for kind, (value, _) in enumerate(design.predict(without)):
            errors[kind, mine] = np.log(value[mine] / design.seen[kind][mine])
    return errors


def quantile(design: Design, errors: np.ndarray, chosen: np.ndarray) -> float | None:
    """Absolute log error that COVERAGE of the chosen rows stay within, large groups weighted down."""
    size = Counter(row.group for row in design.rows)
    weight = np.array([min(1.0, ROWS_PER_GROUP / size[row.group]) for row in design.rows])
    use = chosen & np.isfinite(errors)
    if use.sum() < 10:
        return None
    order = np.argsort(np.abs(errors[use]))
    total = np.cumsum(weight[use][order])
    return float(np.abs(errors[use][order][np.searchsorted(total, COVERAGE * total[-1])]))


def factors_90(design: Design, errors: dict[str, np.ndarray], engine: str | None) -> dict[str, dict[str, float]]:
    """Interval factors of each basis; a basis is never narrower than one with more data behind it."""
    table: dict[str, dict[str, float]] = {}
    chosen = np.array([engine in (None, row.engine) for row in design.rows])
    for basis in BASES:
        table[basis] = {}
        for kind, name in ((1, "ttft"), (0, "tpot")):
            value = quantile(design, errors[basis][kind], chosen)
            if value is None:
                value = quantile(design, errors[basis][kind], np.ones_like(chosen)) or 0.0
            before = [table[one][name] for one in BASES[: BASES.index(basis)] if one != "new_gpu" or basis == "new"]
            table[basis][name] = max(float(np.exp(value)), *before, 1.0)
    return table


def write(design: Design, x: np.ndarray, errors: dict[str, np.ndarray], dropped: Counter[str]) -> None:
    """data/coefficients: one file per engine, and the mean of all for engines without data."""
    FOLDER.mkdir(exist_ok=True)
    for engine in (*ERAS, None):
        made = _record(design, x, errors, dropped, engine)
        text = json.dumps(made, indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
        text = re.sub(r"\{\s+([^{}\[\]]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
        (FOLDER / f"{engine or 'default'}.json").write_text(text + "\n", encoding="utf-8")


def _record(design: Design, x: np.ndarray, errors: dict, dropped: Counter[str], engine: str | None) -> dict:
    rows = [row for row in design.rows if engine in (None, row.engine)]
    mean = {name: design.prior[name][0] * factor for name, factor in _plain(design.factors(x, None), None).items()}
    own = _plain(design.factors(x, "engine"), engine) if engine else {}
    levels = {name: design.factors(x, name) for name in ("era", "architecture", "gpu", "family", "own_family")}
    own_family = levels["own_family"]
    families = {name: _product(one, own_family.get((engine, name), {})) for name, one in levels["family"].items()}
    eras = [
        {
            "from": first,
            "length_spread": 0.0 if (engine, i) in EQUAL_LENGTHS else SPREAD,
            "factors": _round(levels["era"].get((engine, i), {})),
        }
        for i, first in enumerate(ERAS.get(engine, ("0.0.0",)))
    ]
    return {
        "engine": engine,
        "date": datetime.now(UTC).date().isoformat(),
        "script": "benchmarks/fit_steptime.py",
        "files": list(FILES),
        "rows": {"all": len(rows), "ttft": sum(r.ttft_s is not None for r in rows),
                 "tpot": sum(r.tpot_s is not None for r in rows),
                 "sources": dict(Counter(r.source for r in rows).most_common(4))},
        "left_out_of_the_files": dict(dropped.most_common()),
        "coefficients": _round({name: value * own.get(name, 1.0) for name, value in mean.items()}),
        "eras": eras,
        "architectures": {name: _round(one) for name, one in levels["architecture"].items()},
        "gpus": {name: _round(one) for name, one in levels["gpu"].items()},
        "families": {name: _round(one) for name, one in families.items()},
        "groups": sorted({(_family(row), row.gpu) for row in rows if not refused(row)}) if engine else [],
        "factor_90": {b: _round(one) for b, one in factors_90(design, errors, engine).items()},
        "median_error_left_out": {b: _medians(design, errors[b], engine) for b in BASES},
    }  # fmt: skip


def _product(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 1.0) * other.get(name, 1.0) for name in {**one, **other}}


def _plain(table: dict, level: object) -> dict[str, float]:
    return table.get(level, {})


def _round(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _medians(design: Design, errors: np.ndarray, engine: str | None) -> dict[str, object]:
    """Median absolute relative error and the rows behind it."""
    mine = np.array([engine in (None, row.engine) for row in design.rows])
    made: dict[str, object] = {}
    for kind, name in ((1, "ttft"), (0, "tpot")):
        one = errors[kind][mine & np.isfinite(errors[kind])]
        made[name] = float(f"{np.median(np.abs(np.expm1(one))):.3g}") if len(one) else None
        made[f"{name}_rows"] = len(one)
    return made


if __name__ == "__main__":
    begun = time.time()
    made, dropped = cases()
    design, x = fit(made, effects())
    fitted = np.array([np.log(value / seen) for (value, _), seen in zip(design.predict(x), design.seen, strict=True)])
    describe(design, fitted, "fitted")
    errors = errors_by_basis(design, x)
    for basis in (*BASES, "group"):
        describe(design, errors[basis], basis, groups=basis == "group")
    ERRORS.parent.mkdir(exist_ok=True)
    np.savez(ERRORS, **errors)
    write(design, x, errors, dropped)
    print(f"{time.time() - begun:.0f} s")
