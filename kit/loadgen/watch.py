"""The other side during a run: the server's own metrics page and, where it is this machine, its GPUs."""

import http.client
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from kit.telemetry import GpuSampler, ServerMetrics, read_page

SCRAPE_TIMEOUT_S = 2.0
GAUGES = ("running", "waiting", "kv_cache_usage")


class ServerWatch:
    """Scrapes a metrics page about once a second; says None for what it does not expose."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: list[ServerMetrics] = []
        self.gpus = GpuSampler() if urlsplit(url).hostname in ("127.0.0.1", "localhost") else None
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
            values = self._seen(name)
            told |= {name: max(values, default=None), name + "_mean": _mean(values)}
        hits, queries = self._grown("prefix_hits"), self._grown("prefix_queries")
        rate = _mean(self._seen("prefix_hit_rate"))  # a gauge, where the tokens are not counted
        counted, seconds = self._ttft()
        return told | {
            "preemptions": self._grown("preemptions"),
            "prefix_hit_fraction": hits / queries if queries and hits is not None else rate,
            "ttft_mean_s": seconds / counted if counted and seconds is not None else None,
            "ttft_count": counted,
        }

    def _seen(self, name: str) -> list[float]:
        return [one for page in self.pages if (one := getattr(page, name)) is not None]

    def _grown(self, counter: str) -> float | None:
        values = self._seen(counter)
        return values[-1] - values[0] if values else None

    def _ttft(self) -> tuple[float | None, float | None]:
        """Requests of this run that the server's TTFT histogram counted, and their seconds."""
        seen = [page.histograms["ttft"] for page in self.pages if "ttft" in page.histograms]
        if not seen:
            return None, None
        last = seen[-1]
        if len(seen) < len(self.pages):  # the histogram was born during this run
            return last.count, last.sum
        return last.count - seen[0].count, last.sum - seen[0].sum


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
