"""The Prometheus queries of a bundle, and the metric names and labels in them that nobody prints."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from kit.catalog.paths import DATA, load_yaml
from kit.deploy.watch import PAGES, page, series
from kit.engine_config import engine_data
from kit.engines.lint import lint_metrics

Found = list[tuple[Path, str]]
_GROUPED = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\}|\()?")
_WORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan", "by", "without", "on", "ignoring", "group_left"}
_OWN = ("up", "ALERTS", "scrape_samples_scraped")  # Prometheus' own
# Labels that histograms, scraping and this kit's targets add.
_ADDED = {"le", "quantile", "job", "instance", "tier", "gpu_type", "namespace", "pod", "service", "container", "node"}
_PARTS = re.compile(r"_(bucket|sum|count)$")


def expressions(folder: Path) -> Found:
    """Every query of the bundle's rules, dashboards and autoscalers, with its file."""
    found: Found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".yml", ".yaml"):
            found += [
                (path, one) for part in yaml.safe_load_all(path.read_text(encoding="utf-8")) for one in _queries(part)
            ]
        elif path.suffix == ".json" and path.name != "bundle.json":
            found += [(path, one) for one in _queries(json.loads(path.read_text(encoding="utf-8")))]
    return found


def _queries(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        keys = ("expr", "query") if "serverAddress" in value or "threshold" in value else ("expr",)
        yield from (str(value[key]) for key in keys if key in value)
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _queries(one)


def metrics_in(query: str) -> dict[str, set[str]]:
    """Metric names of a query with the labels that choose among their series.

    >>> metrics_in('sum by (model_name) (rate(vllm:request_success_total{finished_reason="stop"}[5m])) > 0.5')
    {'vllm:request_success_total': {'finished_reason'}}
    """
    text = _GROUPED.sub(" ", re.sub(r'"[^"]*"|\'[^\']*\'|\[[^]]*\]', '""', query))
    found: dict[str, set[str]] = {}
    for name, after in _NAME.findall(re.sub(r"\b\d+(\.\d+)?(ms|[smhdwy])?\b", " ", text)):
        if after != "(" and name not in _WORDS:
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", after))
    return found


def unknown_names(folder: Path, found: Found, engines: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Names and labels that none of the recorded pages prints, and whose pages were read."""
    facts, text = load_yaml(DATA / "watch.yaml"), " ".join(query for _, query in found)
    pages = {name: load_yaml(PAGES / f"{name}.yaml")["metrics"] for name in facts["pages"]}
    pages |= {" ".join(one): page(*one) or _unrecorded(one[0]) for one in engines}
    known = {name: set(one["labels"]) for metrics in pages.values() for name, one in metrics.items()}
    known |= {name: {"*"} for name in _OWN}
    for engine, version in engines:  # counters that no page shows before their first event, read in the sources
        born, names = engine_data(engine)["metrics"]["born_with_first_event"], series(engine, version)
        known |= {names[one] or "": {"*"} for one in born if names[one] not in known}
    yamls = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.y*ml")))
    known |= {name: {"*"} for name in re.findall(r"record: (\S+)", yamls)}
    counters = folder / "monitoring" / "dcgm-counters.csv"
    if counters.exists():
        fields = re.findall(r"^(DCGM_\w+)", counters.read_text(encoding="utf-8"), re.MULTILINE)
        known |= {name: set(facts["gpu_labels"]) for name in fields}
    faults = [fault for path, query in found for fault in _faults(path.name, query, known)]
    for engine, version in engines:
        faults += lint_metrics(text, engine, version)
    return sorted(set(faults)), list(pages)


def _unrecorded(engine: str) -> dict[str, Any]:
    """What an engine's sources name, where no page of that version was recorded."""
    table = engine_data(engine)["metrics"]
    names = (table["prefix"] + stem + end for stem in table["known"].split() for end in ("", "_total"))
    return {name: {"labels": ["*"]} for name in names}


def _faults(where: str, query: str, known: dict[str, set[str]]) -> Iterator[str]:
    for name, labels in metrics_in(query).items():
        stem = name if name in known else _PARTS.sub("", name)
        if stem not in known:
            yield f"{where}: nobody prints {name}"
        elif "*" not in known[stem] and (wrong := labels - known[stem] - _ADDED):
            yield f"{where}: {name} has no label {', '.join(sorted(wrong))}"
