"""The metrics page under the engine's own names, from data/engines, with the emulator's lateness."""

from bisect import bisect_left
from itertools import accumulate
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import ResolvedConfig, by_version, engine_data


class Histogram:
    """Observations by upper edge."""

    def __init__(self, edges: list[float]) -> None:
        self.edges, self.counts, self.sum, self.max = edges, [0] * (len(edges) + 1), 0.0, 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value
        self.max = max(value, self.max)

    def lines(self, name: str, labels: str) -> list[str]:
        """In Prometheus text format; `labels` is empty or ends in a comma."""
        counts = list(accumulate(self.counts))
        edges = [*map(str, map(float, self.edges)), "+Inf"]
        rows = [f'{name}_bucket{{{labels}le="{edge}"}} {n}' for edge, n in zip(edges, counts, strict=True)]
        ends = [f"{name}_{end}{{{labels[:-1]}}} {value}" for end, value in (("sum", self.sum), ("count", counts[-1]))]
        return [f"# TYPE {name} histogram", *rows, *ends]


class Page:
    """Names and labels of one engine's page; `histograms` are filled by the clock."""

    def __init__(self, config: ResolvedConfig, model_name: str) -> None:
        data = load_yaml(DATA / "emulator.yaml")
        table, self.own = (
            engine_data(config.engine)["metrics"],
            data["pages"].get(config.engine, data["pages"]["other"]),
        )
        self.paths = {"/metrics", table["path"] or "/metrics"}
        names = {key: by_version(eras, config.engine_version) for key, eras in table["names"].items()}
        self.names = {key: name for key, name in names.items() if name}
        told = {key: by_version(eras, config.engine_version) for key, eras in table["histograms"].items()}
        self.histogram_names = {key: name for key, name in told.items() if name}
        self.histograms = {key: Histogram(edges) for key, edges in self.own["edges"].items()}
        self.late = Histogram(data["late_edges"])
        self.labels = {**self.own["labels"], "model_name": model_name}
        self.block_size = config.block_size

    def text(self, values: dict[str, float], finished: dict[str, int]) -> str:
        """The page now, from our quantities and the finished requests by reason."""
        rows = {}
        for key, name in self.names.items():
            name, _, label = name.partition("@")
            tokens = {label: values[key], "num_gpu_blocks": int(values[key] // self.block_size)} if label else {}
            told = {**tokens, "block_size": self.block_size} if label else self.own.get("own_labels", {}).get(key, {})
            rows[name] = [(told, 1 if label else values[key])]
        if counted := self.own.get("finished"):
            rows[counted] = [({self.own["finished_label"]: reason}, n) for reason, n in finished.items()]
        rows["emulator_info"] = [({"emulated": "true"}, 1)]
        rows["emulator_clock_lateness_max_seconds"] = [({}, self.late.max)]
        lines = self.late.lines("emulator_clock_lateness_seconds", "")
        for name, samples in rows.items():
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"{name}{{{self._labels(told)[:-1]}}} {value}" for told, value in samples]
        for key, name in self.histogram_names.items():
            lines += self.histograms[key].lines(name, self._labels({}))
        return "\n".join(lines) + "\n"

    def _labels(self, more: dict[str, Any]) -> str:
        return "".join(f'{name}="{value}",' for name, value in {**self.labels, **more}.items())
