"""Fitted coefficients of data/coefficients: chosen by engine, version, GPU and model family, with their error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import DATA
from kit.engine_config import ResolvedConfig, version_tuple

FOLDER = DATA / "coefficients"


@dataclass(frozen=True, slots=True)
class Fitted:
    """Coefficients for one case, and the factor that holds 90 % of the errors of such cases."""

    coefficients: Mapping[str, float]
    basis: str  # measured, transfer, new_gpu, new_family or new
    ttft_factor: float
    tpot_factor: float
    length_spread: float  # half width of the lengths in the benchmarks behind the era, as a fraction
    warnings: tuple[str, ...]


def fitted(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig) -> Fitted:
    """The coefficients for that model, GPU and engine; without data they are the mean of all and a guess."""
    known = (FOLDER / f"{config.engine}.json").is_file()
    data = _data(config.engine if known else "default")
    era = _era(data["eras"], config.engine_version)
    factors = (
        era["factors"],
        data["architectures"].get(gpu.architecture, {}),
        data["gpus"].get(gpu.key, {}),
        data["families"].get(model.model_type, {}),
    )
    coefficients = dict(data["coefficients"])
    for table in factors:
        for name, factor in table.items():
            coefficients[name] *= factor
    basis = _basis(data, model.model_type, gpu.key) if known else "new"
    error = data["factor_90"][basis]
    return Fitted(
        coefficients=coefficients,
        basis=basis,
        ttft_factor=error["ttft"],
        tpot_factor=error["tpot"],
        length_spread=era["length_spread"],
        warnings=_warnings(basis, known, model, gpu, config),
    )


@cache
def _data(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def _era(eras: list[dict[str, Any]], version: str) -> dict[str, Any]:
    reached = [era for era in eras if version_tuple(era["from"]) <= version_tuple(version)]
    return reached[-1] if reached else eras[0]


def _basis(data: dict[str, Any], family: str, gpu: str) -> str:
    """How near the data comes to the case."""
    if [family, gpu] in data["groups"]:
        return "measured"
    families, gpus = ({group[i] for group in data["groups"]} for i in (0, 1))
    if family in families:
        return "transfer" if gpu in gpus else "new_gpu"
    return "new_family" if gpu in gpus else "new"


def _warnings(basis: str, known: bool, model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig) -> tuple[str, ...]:
    if not known:
        return (f"guess: no measurement of {config.engine} is behind this; coefficients are the mean of other engines",)
    family = f"{model.model_type} models"
    return {
        "measured": (),
        "transfer": (f"no measurement of {family} on {gpu.key}: carried over from other models and GPUs",),
        "new_gpu": (f"guess: no measurement of {config.engine} on {gpu.key}: scaled by its datasheet",),
        "new_family": (f"no measurement of {config.engine} with {family}: computed from the shape alone",),
        "new": (f"guess: no measurement of {config.engine} with {family} or on {gpu.key}: scaled by the datasheet",),
    }[basis]
