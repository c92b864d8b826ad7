"""The other side during a run: the server's metrics page and, on this machine, its GPUs."""

import http.client
import re
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from kit.catalog.paths import DATA, load_yaml

SCRAPE_TIMEOUT_S = 2.0
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", re.MULTILINE)
GAUGES = ("running", "waiting", "kv_cache_usage", "prefix_hit_rate")
FRACTIONS = ("kv_cache_usage", "prefix_hit_rate")  # the mean over replicas; other values add up
COUNTERS = ("preemptions", "prefix_hits", "prefix_queries")


def read_page(page: str) -> dict[str, float]:
    """Our quantities from a Prometheus page; those that it does not expose are absent.

    >>> read_page('vllm:num_requests_running{engine="0"} 3.0\\nvllm:num_requests_running 4')
    {'running': 7.0}
    """
    samples: dict[str, list[float]] = {}
    for name, value in SAMPLE.findall(page):
        samples.setdefault(name, []).append(float(value))
    found: dict[str, float] = {}
    for names in load_yaml(DATA / "engines" / "metrics.yaml").values():
        for quantity, spellings in names.items():
            if quantity == "ttft":
                found |= _first(samples, [name + "_sum" for name in spellings], "ttft_sum")
                found |= _first(samples, [name + "_count" for name in spellings], "ttft_count")
            else:
                both = [name + end for name in spellings for end in ("", "_total")]
                found |= _first(samples, both, quantity)
    return found


def _first(
    samples: dict[str, list[float]], spellings: Iterable[str], quantity: str
) -> dict[str, float]:
    for name in spellings:
        if name in samples:
            values = samples[name]
            return {quantity: sum(values) / (len(values) if quantity in FRACTIONS else 1)}
    return {}


class ServerWatch:
    """Scrapes a metrics page about once a second; says None for what it does not expose."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: list[dict[str, float]] = []
        self.gpus = _GpuWatch() if urlsplit(url).hostname in ("127.0.0.1", "localhost") else None
        self.exposed = self.poll()

    def poll(self) -> bool:
        """Take one sample of server and GPUs; false where the page has nothing known."""
        if self.gpus:
            self.gpus.poll()
        if self.pages or not hasattr(self, "exposed"):
            try:
                with urllib.request.urlopen(self.url, timeout=SCRAPE_TIMEOUT_S) as answer:
                    page = read_page(answer.read().decode(errors="replace"))
            except (OSError, ValueError, http.client.HTTPException):
                return False
            if page:
                self.pages.append(page)
        return bool(self.pages)

    def result(self) -> dict[str, Any]:
        """Highest gauges, counted events, prefix hits and mean TTFT of the server over the run."""
        first, last = (self.pages[0], self.pages[-1]) if self.pages else ({}, {})
        told: dict[str, Any] = {}
        for name in GAUGES:
            values = [page[name] for page in self.pages if name in page]
            told[name] = max(values) if values else None
            told[name + "_mean"] = sum(values) / len(values) if values else None
        grown = {name: last[name] - first.get(name, 0.0) for name in last}
        queries = grown.get("prefix_queries")
        hits = grown.get("prefix_hits", 0.0) / queries if queries else told["prefix_hit_rate_mean"]
        counted = grown.get("ttft_count")
        return {
            **{name: value for name, value in told.items() if "prefix" not in name},
            "preemptions": grown.get("preemptions"),
            "prefix_hit_fraction": hits,
            "ttft_mean_s": grown["ttft_sum"] / counted if counted and "ttft_sum" in grown else None,
            "ttft_count": counted,
        }


class _GpuWatch:
    """Utilisation, memory and power of this machine's NVIDIA GPUs; none where NVML is not there."""

    def __init__(self) -> None:
        import pynvml

        self.nvml, self.handles = pynvml, []
        self.samples: list[tuple[float, float, float]] = []
        try:
            pynvml.nvmlInit()
            found = range(pynvml.nvmlDeviceGetCount())
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in found]
        except pynvml.NVMLError:
            return

    def poll(self) -> None:
        for handle in self.handles:
            try:
                busy = self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                used = self.nvml.nvmlDeviceGetMemoryInfo(handle).used
                watts = self.nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            except self.nvml.NVMLError:
                continue
            self.samples.append((busy, float(used), watts))

    def result(self) -> dict[str, Any] | None:
        """Means over GPUs and samples, and the most memory used by one GPU; None without a GPU."""
        if not self.samples:
            return None
        busy, used, watts = zip(*self.samples, strict=True)
        return {
            "gpus": len(self.handles),
            "utilization_fraction": sum(busy) / len(busy),
            "memory_used_bytes": max(used),
            "power_w": sum(watts) / len(watts),
        }
