"""A calibration as a JSON file: what it was measured of, what it says, and what it may be used for."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import write_json
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.steptime import Fitted

# Flags that change what a step costs; the others are limits, which the simulator takes as they are.
DECISIVE = (
    "engine_version", "tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype",
    "enforce_eager",
)  # fmt: skip
SAYS = {
    "gpu": "calibrated on a live server",
    "cpu": "calibrated on an engine without a GPU: this shows its behaviour, never a GPU's speed",
    "emulator": "calibrated on an emulator: the modelled engine, not a GPU's speed",
}


@dataclass(frozen=True)
class Calibration:
    """Coefficients of one model on one GPU under one engine; factors hold 90 % of what it did not see."""

    model: str
    gpu: str
    config: dict[str, Any]  # engine options as they were given
    date: str
    measured_on: str  # a key of SAYS
    coefficients: dict[str, float]
    kv_cache_factor: float  # the pool that the server told over the predicted one
    kv_cache_tokens: float | None  # None: it told none
    ttft_factor_90: float
    tpot_factor_90: float
    probes: list[dict[str, Any]]
    probe_s: float

    def told(self) -> dict[str, Any]:
        """The file's keys, with the sentence that says where it comes from."""
        return {"calibration": 1, "provenance": f"{SAYS[self.measured_on]}, {self.date}", **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json(path, self.told())

    def apply(self, model: ModelSpec, gpu: GpuSpec, config: EngineConfig) -> tuple[EngineConfig, Fitted]:
        """The options, what was left open taken from the calibrated server, and its coefficients.

        Raises UserError for another model, GPU or engine, or a flag that changes what a step costs.
        """
        own = EngineConfig(**self.config)
        asked = {"model": model.key, "gpu": gpu.key, "engine": config.engine}
        _same({"model": self.model, "gpu": self.gpu, "engine": own.engine}, asked)
        filled = replace(own, **{name: value for name, value in asdict(config).items() if value != UNSET[name]})
        theirs, wanted = (resolve(one, model, gpu) for one in (own, filled))
        _same(*({name: getattr(one, name) for name in DECISIVE} for one in (theirs, wanted)))
        basis = Fitted(self.coefficients, "calibrated", self.ttft_factor_90, self.tpot_factor_90, 0.0,
                       (self.told()["provenance"],), self.kv_cache_factor)  # fmt: skip
        return filled, basis


def _same(ours: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuses what was asked for and is not what the calibration has."""
    for name, value in ours.items():
        if value != asked[name]:
            raise UserError(f"--calibration is of --{name.replace('_', '-')} {value}, not {asked[name]}")


UNSET = asdict(EngineConfig())


def load(path: Path) -> Calibration:
    """The calibration in that file; raises UserError where it is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(**{one.name: held[one.name] for one in fields(Calibration)})
    except OSError as error:
        raise UserError(f"--calibration {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"--calibration {path}: not a calibration that kit calibrate wrote") from None
