"""The metrics page under the engine's own names, from data/engines, with the emulator's lateness."""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import ResolvedConfig, by_version, engine_data
from kit.scheduler import SchedulerConfig


class Histogram:
    """Observations by upper edge; without a name it is not shown."""

    def __init__(self, name: str | None, edges: list[float]) -> None:
        self.name, self.edges, self.counts, self.sum, self.max = name, edges, [0] * (len(edges) + 1), 0.0, 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value
        self.max = max(value, self.max)

    def lines(self, labels: str) -> list[str]:
        """Itself in Prometheus text format."""
        edges, counts, name = [*map(str, map(float, self.edges)), "+Inf"], list(accumulate(self.counts)), self.name
        rows = [f'{name}_bucket{{le="{edge}",{labels}}} {n}' for edge, n in zip(edges, counts, strict=True)]
        ends = [f"{name}_{end}{{{labels}}} {value}" for end, value in (("sum", self.sum), ("count", counts[-1]))]
        return [f"# TYPE {name} histogram", *rows, *ends]


class Page:
    """Names and labels of one engine's page; who keeps the time fills the histograms."""

    def __init__(self, config: ResolvedConfig, model_name: str, limits: SchedulerConfig) -> None:
        pages, engine = load_yaml(DATA / "emulator.yaml")["pages"], engine_data(config.engine)["metrics"]
        own, self.path = pages.get(config.engine, pages["other"]), engine["path"] or "/metrics"
        self.names, timed = (
            {key: by_version(eras, config.engine_version) for key, eras in engine[part].items()} | own.get(part, {})
            for part in ("names", "histograms")
        )
        self.histograms = {key: Histogram(timed.get(key), edges) for key, edges in own["edges"].items()}
        self.queue_time_at_end = own["queue_time_at_end"]
        given = {"model": model_name, "kv_blocks": limits.kv_blocks, "block_size": limits.block_size}
        self.labels = {key: told.format(**given) for key, told in own["labels"].items()}

    def text(self, values: Mapping[str, float]) -> str:
        """The page now, from our quantities."""
        common, rows = self.labels["all"], dict[str, dict[str, float]]()
        for key, spelling in self.names.items():
            (name, _, label), labels, value = (spelling or "").partition("@"), self.labels.get(key, common), values[key]
            if label:
                labels, value = f'{label}="{int(value)}",{labels}', 1.0
            rows.setdefault(name, {})[labels] = value  # SGLang tells two of our quantities in one counter
        rows.pop("", None)  # what the engine does not tell
        lines = []
        for name, samples in rows.items():
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"{name}{{{labels}}} {value}" for labels, value in samples.items()]
        shown = [histogram.lines(common) for histogram in self.histograms.values() if histogram.name]
        return "\n".join(sum(shown, lines)) + "\n"
