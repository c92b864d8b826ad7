"""What a server and its GPUs tell of themselves: one reader for every engine's metrics page, and NVML."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kit.engine_config import ENGINES, engine_data

# A replica's own share: several label sets give a mean, where other values add up.
FRACTIONS = ("kv_cache_usage", "prefix_hit_rate")


@dataclass(frozen=True, slots=True)
class Histogram:
    """How much was observed, and its sum."""

    count: float
    sum: float


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """One page in our words; None says that this engine does not expose it."""

    engine: str
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None  # fraction
    preemptions: float | None = None
    prefix_hits: float | None = None  # tokens
    prefix_queries: float | None = None  # tokens
    prefix_hit_rate: float | None = None  # fraction, where only a gauge tells it
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    refused: float | None = None
    kv_cache_tokens: float | None = None
    histograms: dict[str, Histogram] = field(default_factory=dict)


def read_page(page: str) -> ServerMetrics | None:
    """The page in our words; None where no known engine speaks on it.

    >>> read_page('vllm:num_requests_running{engine="0"} 3\\nvllm:num_requests_running{engine="1"} 4\\n').running
    7.0
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except ValueError:
        return None  # not a Prometheus page
    for engine in ENGINES:
        table = engine_data(engine)["metrics"]
        if any(name.startswith(table["prefix"]) for name in samples):
            values = {name: _value(samples, name, table) for name in table["names"]}
            seconds = {name: _histogram(samples, eras) for name, eras in table["histograms"].items()}
            told = {name: one for name, one in seconds.items() if one is not None}
            return ServerMetrics(engine, **values, histograms=told)
    return None


def spellings(eras: Any) -> Iterator[str]:
    """Every name that a quantity has had, the newest first."""
    if isinstance(eras, list):
        yield from (era["value"] for era in reversed(eras))
    elif eras:
        yield eras


Samples = dict[str, list[tuple[dict[str, str], float]]]


def _value(samples: Samples, quantity: str, table: dict[str, Any]) -> float | None:
    for spelling in spellings(table["names"][quantity]):
        name, _, label = spelling.partition("@")
        found = samples.get(name) or samples.get(name.removesuffix("_total"), [])
        texts = [labels.get(label, "") for labels, _ in found] if label else []
        values = [float(text) for text in texts if text.isdigit()] if label else [v for _, v in found]
        if values:
            return sum(values) / (len(values) if quantity in FRACTIONS else 1)
    return 0.0 if quantity in table["born_with_first_event"] else None


def _histogram(samples: Samples, eras: Any) -> Histogram | None:
    for name in spellings(eras):
        if name + "_count" in samples:
            return Histogram(*(sum(v for _, v in samples.get(name + end, [])) for end in ("_count", "_sum")))
    return None


class GpuSampler:
    """VRAM, utilisation and power of this machine's NVIDIA GPUs; no samples where NVML is not there."""

    def __init__(self) -> None:
        import pynvml

        self.nvml, self.handles = pynvml, []
        self.samples: list[tuple[float, float, float]] = []  # bytes used, fraction busy, W
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def poll(self) -> None:
        """Take one sample of every GPU."""
        for handle in self.handles:
            with suppress(self.nvml.NVMLError):
                used_bytes = self.nvml.nvmlDeviceGetMemoryInfo(handle).used
                busy = self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self.samples.append((used_bytes, busy, self.nvml.nvmlDeviceGetPowerUsage(handle) / 1e3))

    def result(self) -> dict[str, Any] | None:
        """Means over GPUs and samples, and the most memory used by one GPU; None without a GPU."""
        if not self.samples:
            return None
        used, busy, power = zip(*self.samples, strict=True)
        means = {"utilization_fraction": sum(busy) / len(busy), "power_w": sum(power) / len(power)}
        return {"gpus": len(self.handles), **means, "memory_used_bytes": max(used)}
