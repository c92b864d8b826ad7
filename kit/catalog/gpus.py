"""GPUs of data/gpus.yaml."""

from dataclasses import dataclass, fields
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU as engines see it; rates are dense peaks of the datasheet."""

    key: str
    name: str
    memory_bytes: int  # what CUDA or HIP reports, not the nominal GB
    memory_relative_uncertainty: float  # half width of a 90 % interval, as a fraction
    memory_bandwidth_bytes_per_s: float
    dense_flops_per_s: dict[str, float | None]  # by dtype: bf16, fp8, int8, fp4
    link: str
    link_bytes_per_s: float  # per direction, per GPU
    pcie_bytes_per_s: float
    power_w: float
    compute_capability: str | None  # None on AMD
    architecture: str
    multiprocessors: int
    nvml_names: tuple[str, ...]
    source: dict[str, str]

    def flops_per_s(self, dtype: str) -> float:
        """Dense FLOP/s in a GEMM dtype, that of 16 bits where the card has no unit for it."""
        rates = self.dense_flops_per_s
        if rate := rates.get(dtype) or rates.get("bf16") or rates.get("fp16"):
            return rate
        raise UserError(f"{self.key} has no {dtype} or 16-bit rate in data/gpus.yaml")


def gpu_keys() -> list[str]:
    """Every key of data/gpus.yaml."""
    return list(load_yaml(DATA / "gpus.yaml"))


def gpu(key: str) -> GpuSpec:
    """The GPU of that key; refuses an unknown one with the nearest keys."""
    records: dict[str, Any] = load_yaml(DATA / "gpus.yaml")
    record, found = records.get(key.strip().lower()), key.strip().lower()
    if record is None:
        raise unknown("GPU", key, records, shown=30)
    link = {"link": record["link"]["name"], "link_bytes_per_s": record["link"]["bytes_per_s_per_direction"]}
    told = record | link | {"key": found, "nvml_names": tuple(record["nvml_names"])}
    return GpuSpec(**{one.name: told[one.name] for one in fields(GpuSpec)})
