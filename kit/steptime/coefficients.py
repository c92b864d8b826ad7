"""Fitted coefficients of data/coefficients: chosen by engine, version, GPU and model family, with their error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import DATA
from kit.engine_config import ResolvedConfig, version_tuple

FOLDER = DATA / "coefficients"
WARNINGS = {
    "transfer": "no measurement of {engine} with {family} models on {gpu}: carried over from other models and GPUs",
    "new_gpu": "guess: no measurement of {engine} on {gpu}: scaled by its datasheet",
    "new_family": "no measurement of {engine} with {family} models: computed from the shape alone",
    "new": "guess: no measurement of {engine} with {family} models or on {gpu}: scaled by the datasheet",
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """Coefficients for one case, and the factors that hold 90 % of the errors of such cases."""

    coefficients: Mapping[str, float]
    basis: str  # measured, a key of WARNINGS, or calibrated
    ttft_factor: float
    tpot_factor: float
    length_spread: float  # half width of the lengths in the benchmarks behind the era, as a fraction
    warnings: tuple[str, ...]
    kv_cache_factor: float = 1.0  # of a calibration: the pool that its server had over the predicted one

    def intervals(self, found: Mapping[str, Any], came_tokens_per_s: float = inf) -> dict[str, list[float] | None]:
        """90 % intervals of `found`, from the errors of cases with as much data behind them; no more tokens than came.

        Those errors are of closed loops: a queue near capacity stretches further than they tell.
        """
        ttft_s, tpot_s, tokens_per_s = found["ttft_s"], found["tpot_s"], found["output_tokens_per_s"]
        intervals = {"ttft_s_mean": _around(ttft_s["mean"], self.ttft_factor)}
        intervals |= {"ttft_s_p50": _around(ttft_s["p50"], self.ttft_factor)}
        intervals |= {"tpot_s_mean": _around(tpot_s["mean"], self.tpot_factor), "output_tokens_per_s": None}
        if tokens_per_s and ttft_s["mean"] and found["e2el_s"]["mean"]:
            share = min(1.0, ttft_s["mean"] / found["e2el_s"]["mean"])
            rate = self.ttft_factor**share * self.tpot_factor ** (1 - share)
            most = max(tokens_per_s, min(tokens_per_s * rate, came_tokens_per_s))
            intervals["output_tokens_per_s"] = [tokens_per_s / rate, most]
        return intervals


def fitted(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig) -> Fitted:
    """The coefficients for that model, GPU and engine; without data they are the mean of all and a guess."""
    engine, family = config.engine, model.model_type
    data = _data(engine if (FOLDER / f"{engine}.json").is_file() else "default")
    now = version_tuple(config.engine_version)
    era = [one for one in data["eras"] if version_tuple(one["from"]) <= now][-1]
    coefficients = dict(data["coefficients"])
    levels = (("architectures", gpu.architecture), ("gpus", gpu.key), ("families", family))
    for factors in (era["factors"], *(data[table].get(level, {}) for table, level in levels)):
        for name, factor in factors.items():
            coefficients[name] *= factor
    basis = _basis(data["groups"], family, gpu.key)
    error = data["factor_90"][basis]
    text = WARNINGS.get(basis, "").format(engine=engine, family=family, gpu=gpu.key)
    spread = era["length_spread"]
    return Fitted(coefficients, basis, error["ttft"], error["tpot"], spread, (text,) if text else ())


def _around(value: float | None, factor: float) -> list[float] | None:
    return None if value is None else [value / factor, value * factor]


@cache
def _data(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def _basis(groups: list[list[str]], family: str, gpu: str) -> str:
    """How near the measured (family, GPU) pairs come to the case."""
    if [family, gpu] in groups:
        return "measured"
    if any(group[0] == family for group in groups):
        return "transfer" if any(group[1] == gpu for group in groups) else "new_gpu"
    return "new_family" if any(group[1] == gpu for group in groups) else "new"
