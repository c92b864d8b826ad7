"""The metrics page under the engine's own names, from data/engines, with the emulator's lateness."""

from bisect import bisect_left
from itertools import accumulate

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
        """Itself in Prometheus text format."""
        edges, counts = [*map(str, map(float, self.edges)), "+Inf"], list(accumulate(self.counts))
        rows = [f'{name}_bucket{{le="{edge}",{labels}}} {n}' for edge, n in zip(edges, counts, strict=True)]
        ends = [f"{name}_{end}{{{labels}}} {value}" for end, value in (("sum", self.sum), ("count", counts[-1]))]
        return [f"# TYPE {name} histogram", *rows, *ends]


class Page:
    """Names and labels of one engine's page; who keeps the time fills the histograms."""

    def __init__(self, config: ResolvedConfig, model_name: str) -> None:
        ours, table = load_yaml(DATA / "emulator.yaml"), engine_data(config.engine)["metrics"]
        self.own = ours["pages"].get(config.engine) or ours["pages"]["other"]
        self.path, self.names, self.histogram_names = (
            table["path"],
            *(
                {key: by_version(eras, config.engine_version) for key, eras in table[part].items()}
                for part in ("names", "histograms")
            ),
        )
        self.histograms = {key: Histogram(edges) for key, edges in self.own["edges"].items()}
        self.late = Histogram(ours["late_edges"])
        self.labels = {key: told.replace("{model}", model_name) for key, told in self.own["labels"].items()}

    def text(self, values: dict[str, float], block_size: int) -> str:
        """The page now, from our quantities and the requests that ended, by reason."""
        common = self.labels["all"]
        rows = [("emulator_info", f'emulated="true",{common}', 1.0)]
        rows.append(("emulator_clock_lateness_max_seconds", common, self.late.max))
        for key, spelling in self.names.items():
            (name, _, label), labels, value = (spelling or "").partition("@"), self.labels.get(key, common), values[key]
            if label:
                blocks = f'num_gpu_blocks="{int(value // block_size)}",block_size="{block_size}"'
                labels, value = f'{label}="{int(value)}",{blocks},{labels}', 1.0
            rows += [(name, labels, value)] if name else []
        for name, label in self.own.get("ended", {}).items():
            rows += [(name, f'{label}="{why}",{common}', values[why]) for why in ("stop", "length", "abort")]
        rows = list({row[:2]: row for row in rows}.values())  # SGLang tells two of our quantities in one counter
        lines = self.late.lines("emulator_clock_lateness_seconds", common)
        for name, samples in {name: [row for row in rows if row[0] == name] for name, *_ in rows}.items():
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"{name}{{{labels}}} {value}" for _, labels, value in samples]
        for key, name in self.histogram_names.items():
            lines += self.histograms[key].lines(name, common) if name else []
        return "\n".join(lines) + "\n"
