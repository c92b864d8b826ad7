"""The other side during a run: the server's own metrics page and, where it is this machine, its GPUs."""

import http.client
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kit.telemetry import GpuSampler, ServerMetrics, read_page

SCRAPE_TIMEOUT_S = 2.0
GAUGES = ("running", "waiting", "kv_cache_usage")


class ServerWatch:
    """Scrapes a metrics page about once a second; says None for what it does not expose."""

    def __init__(self, url: str, gpu_log: Path | None = None) -> None:
        self.url = url
        self.pages: list[ServerMetrics] = []
        local = urlsplit(url).hostname in ("127.0.0.1", "localhost")
        self.gpus = GpuSampler(gpu_log) if local else None
        self.exposed = True
        self.poll()
        self.exposed = bool(self.pages)

    def poll(self) -> None:
        """Take one sample of the GPUs, and of the server if its page had anything known."""
        if self.gpus:
            self.gpus.poll()
        if not self.exposed:
            return
        try:
            with urllib.request.urlopen(self.url, timeout=SCRAPE_TIMEOUT_S) as answer:
                page = read_page(answer.read().decode(errors="replace"))
        except (OSError, ValueError, http.client.HTTPException):
            return
        if page:
            self.pages.append(page)

    def result(self) -> dict[str, Any]:
        """Highest gauges, counted events, prefix hits and mean TTFT of the server over the run."""
        told: dict[str, Any] = {}
        for name in GAUGES:
            values = [one for page in self.pages if (one := getattr(page, name)) is not None]
            told[name] = max(values) if values else None
            told[name + "_mean"] = sum(values) / len(values) if values else None
        counted, seconds = self._ttft()
        return {
            **told,
            "preemptions": self._grown("preemptions"),
            "prefix_hit_fraction": self._prefix_hit_fraction(),
            "ttft_mean_s": seconds / counted if counted and seconds is not None else None,
            "ttft_count": counted,
        }

    def _grown(self, counter: str) -> float | None:
        values = [one for page in self.pages if (one := getattr(page, counter)) is not None]
        return values[-1] - values[0] if values else None

    def _prefix_hit_fraction(self) -> float | None:
        """Hit share of the prompt tokens of this run; else the mean of the gauge."""
        hits, queries = self._grown("prefix_hits"), self._grown("prefix_queries")
        if queries and hits is not None:
            return hits / queries
        rates = [page.prefix_hit_rate for page in self.pages if page.prefix_hit_rate is not None]
        return sum(rates) / len(rates) if rates else None

    def _ttft(self) -> tuple[float | None, float | None]:
        """Requests of this run that the server's TTFT histogram counted, and their seconds."""
        seen = [page.histograms["ttft"] for page in self.pages if "ttft" in page.histograms]
        if not seen:
            return None, None
        new = len(seen) < len(self.pages)  # the histogram was born during this run
        first, last = seen[0], seen[-1]
        return (last.count, last.sum) if new else (last.count - first.count, last.sum - first.sum)
