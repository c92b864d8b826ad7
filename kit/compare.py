"""Runs of the walkthrough side by side: a table and a figure across GPUs."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import catalog, notebook
from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError

IDENTITY = "model", "scenario"


@dataclass(frozen=True)
class Run:
    """One GPU's folder, with the results.json of every notebook that ran in it."""

    folder: Path
    records: Mapping[str, Any]  # by notebook

    @property
    def gpu(self) -> str:
        return str(next(iter(self.records.values()))["gpu"])

    def about(self, name: str) -> str:
        """Model or scenario, of all its notebooks."""
        return ", ".join(sorted({str(record.get(name) or "none") for record in self.records.values()}))

    def value(self, row: Mapping[str, Any]) -> Any:
        """What a row of data/compare.yaml asks for; None where this run does not say."""
        found: Any = self.records.get(row["notebook"], {}).get("results")
        for key in row["at"].split("."):
            if isinstance(found, list):
                found = _entry(found, key, self.gpu)
            else:
                found = found.get(key) if isinstance(found, dict) else None
        return found

    def how(self, row: Mapping[str, Any]) -> str | None:
        """measured, modelled or quoted; None where there is no value."""
        if self.value(row) is None or row["how"] != "run":
            return row["how"] if self.value(row) is not None else None
        return "modelled" if self.records[row["notebook"]].get("source") == "emulator" else "measured"


def _entry(found: list[Any], key: str, gpu: str) -> Any:
    if key == "@gpu":
        return next((one for one in found if one.get("gpu") == gpu), None)
    with suppress(ValueError, IndexError):
        return found[int(key)]
    return None


def read(path: Path) -> list[Run]:
    """The run of a GPU's folder, or every run in a folder of them; UserError names what holds none."""
    records = {file.parent.name: _record(file) for file in sorted(path.glob("*/results.json"))}
    if records:
        return [Run(path, records)]
    runs = [run for folder in sorted(path.glob("*/")) if any(folder.glob("*/results.json")) for run in read(folder)]
    if not runs:
        what = "no such folder" if not path.is_dir() else "no NOTEBOOK/results.json in it; kit run writes them"
        raise UserError(f"{path}: {what}")
    return runs


def _record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {**record, "gpu": record["gpu"], "results": record["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a notebook's results ({error})") from None


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """`runs` with a value and its provenance for every quantity that one of them has, and `warnings`."""
    rows = [row for row in load_yaml(DATA / "compare.yaml") if any(run.value(row) is not None for run in runs)]
    told = [
        {"run": str(run.folder), "gpu": run.gpu, **{name: run.about(name) for name in IDENTITY}}
        | {"values": {row["quantity"]: run.value(row) for row in rows}}
        | {"provenance": {row["quantity"]: run.how(row) for row in rows}}
        for run in runs
    ]
    mixed = [name for name in IDENTITY if len({one[name] for one in told}) > 1]
    warnings = [f"the runs differ in {name}: {'; '.join(sorted({one[name] for one in told}))}" for name in mixed]
    return {"quantities": [row["quantity"] for row in rows], "runs": told, "warnings": warnings}


def table(found: Mapping[str, Any]) -> str:
    """A line per quantity, a column per run, and which of them were measured."""
    runs = found["runs"]
    heads = [f"{number} {run['gpu']}" for number, run in enumerate(runs, 1)]
    lines = [
        {"quantity": name, **{head: run["values"][name] for head, run in zip(heads, runs, strict=True)}}
        | {"how": told_how(found, name)}
        for name in found["quantities"]
    ]
    return notebook.table(lines) if lines else "nothing to compare"


def told_how(found: Mapping[str, Any], name: str) -> str:
    """The provenance of a quantity: one word where all runs agree, else by GPU."""
    hows = {run["gpu"]: run["provenance"][name] for run in found["runs"] if run["provenance"][name]}
    same = len(set(hows.values())) == 1
    return next(iter(hows.values())) if same else ", ".join(f"{gpu} {how}" for gpu, how in hows.items())


def figure(found: Mapping[str, Any], folder: Path) -> Path:
    """compare.png in that folder: a panel of bars per quantity, a bar per run."""
    import matplotlib.style
    from matplotlib import pyplot as plt

    from kit import plots

    matplotlib.style.use(Path(__file__).with_name("kit.mplstyle"))
    runs, names = found["runs"], found["quantities"]
    height = 0.7 + len(names) * (0.7 + 0.3 * len(runs))
    _, panels = plt.subplots(len(names), 1, figsize=(8, height), squeeze=False, layout="constrained")
    for ax, name in zip(panels[:, 0], names, strict=True):
        values = [run["values"][name] for run in runs]
        labels = [f"{number} {plots.short_name(catalog.gpu(run['gpu']))}" for number, run in enumerate(runs, 1)]
        bars = ax.barh(labels, [value or 0 for value in values], color=[plots.gpu_colour(run["gpu"]) for run in runs])
        texts = ["unknown" if one is None else f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in values]
        ax.bar_label(bars, texts, padding=4)
        ax.set(xlim=(0, 1.2 * max(filter(None, values), default=1)), xticks=[])
        ax.set_title(f"{name} ({told_how(found, name)})", fontsize=10)
        ax.invert_yaxis()
        ax.grid(visible=False)
    folder.mkdir(parents=True, exist_ok=True)
    plt.savefig(folder / "compare.png")
    plt.close()
    return folder / "compare.png"
