"""What is watched: an engine's own metric names behind rules, alerts and dashboards that do not name them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import by_version, engine_data

PAGES = DATA / "metric_pages"
LATENCIES = ("ttft", "itl", "tpot", "e2el", "queue_time")
QUANTITIES = (
    "running", "waiting", "kv_cache_usage", "preemptions", "prefix_hits", "prefix_queries", "generation_tokens",
    "prompt_tokens", "finished", "aborted", "capacity_waiting", "http_answers", "http_errors", *LATENCIES,
)  # fmt: skip


def series(engine: str, version: str) -> dict[str, str | None]:
    """What that engine version calls each quantity and latency histogram; None for what it does not print."""
    data = engine_data(engine)
    names = dict[str, str | None].fromkeys(QUANTITIES)
    for eras in (data["metrics"]["names"], data["metrics"]["histograms"], data.get("watch", {})):
        names |= {key: by_version(value, version) for key, value in eras.items()}
    return names


def page(engine: str, version: str) -> dict[str, dict[str, Any]]:
    """Type, labels and edges by metric name, as that version printed them; empty where none was recorded."""
    path = PAGES / f"{engine}-{version}.yaml"
    metrics: dict[str, dict[str, Any]] = load_yaml(path)["metrics"] if path.exists() else {}
    return metrics


def edge_at(histogram: str | None, limit_s: float, engine: str, version: str) -> str | None:
    """The `le` of the largest bucket that ends at the limit or below, as the engine spells it."""
    edges = page(engine, version).get(histogram or "", {}).get("edges", [])
    return max((edge for edge in edges if float(edge) <= limit_s), key=float, default=edges[0] if edges else None)


def context(
    engine: str, version: str, targets: Mapping[str, Sequence[Mapping[str, str]]], slo: Mapping[str, float],
    *, gpus: int, start_s: float = 600, usd_per_hour: Mapping[str, float] | None = None,
    budget_usd: float | None = None, kubernetes: bool = False, router: Mapping[str, str] | None = None,
    webhook_file: str = "/run/secrets/alert_webhook_url", **thresholds: float,
) -> dict[str, Any]:  # fmt: skip
    """What the templates of docker/templates/monitoring read as `watch`.

    `targets` holds {address, tier, gpu} by job (engine, edge, gpu), `slo` the limits ttft_s and tpot_s; `start_s` is a
    burst replica's predicted time to serve, `usd_per_hour` a replica's price by tier; `thresholds` are those of
    data/watch.yaml.
    """
    names, limits = series(engine, version), load_yaml(DATA / "watch.yaml")["thresholds"] | thresholds
    given = {"engine": engine, "version": version, "metrics_path": engine_data(engine)["metrics"]["path"] or "/metrics"}
    scraped = targets["engine"] if names["running"] else ()  # an engine without metrics is watched at the edge
    given |= {"targets": {"edge": (), "gpu": (), **targets, "engine": scraped}, "gpus": gpus, "kubernetes": kubernetes}
    given |= {"burst": any(one["tier"] == "burst" for one in targets["engine"]), "webhook_file": webhook_file}
    given |= {"start_s": round(start_s), "stuck_s": round(2 * start_s), "usd_per_hour": usd_per_hour or {}}
    given |= {"budget_usd": budget_usd, "router": router, "slo_ttft_s": slo["ttft_s"], "slo_tpot_s": slo["tpot_s"]}
    given |= {"latencies": {name: names[name] for name in LATENCIES if names[name]}, **names, **limits}
    given["ttft_edge"] = edge_at(names["ttft"], slo["ttft_s"], engine, version)
    given["burn"] = round(limits["burn_rate"] * (1 - limits["attainment"]), 6)
    given["budget_percent"] = round(100 * (1 - limits["attainment"]), 6)
    given["dashboard"] = lambda uid: dashboard(uid, given)
    return given


def panels(uid: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A dashboard of data/watch.yaml and its panels: title, unit, limit, lines {legend: query}."""
    (board,) = [one for one in load_yaml(DATA / "watch.yaml")["dashboards"] if one["uid"] == uid]
    return board, board["panels"]


def dashboard(uid: str, limits: Mapping[str, Any]) -> str:
    """Grafana's JSON of a dashboard, its limits filled in; two panels a row."""
    board, given = panels(uid)
    printed = [one for one in given if "needs" not in one or limits[one["needs"]]]
    shown = [_panel(number, one, limits) for number, one in enumerate(printed)]
    told = {"title": board["title"], "uid": board["uid"], "description": board["what"], "tags": ["agents"]}
    told |= {"schemaVersion": 39, "editable": False, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}}
    return json.dumps({**told, "panels": shown}, indent=1, ensure_ascii=False)


def _panel(number: int, one: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    targets = [
        {"refId": chr(65 + place), "datasource": source, "expr": query, "legendFormat": legend}
        for place, (legend, query) in enumerate(one["lines"].items())
    ]
    limit = limits.get(one["limit"], one["limit"]) if "limit" in one else None
    steps = [{"color": "green", "value": None}, *([{"color": "red", "value": limit}] if limit is not None else [])]
    style = {"fillOpacity": 8, "showPoints": "never"} | (
        {"thresholdsStyle": {"mode": "line"}} if limit is not None else {}
    )
    defaults = {"unit": one["unit"], "min": 0, "custom": style, "thresholds": {"mode": "absolute", "steps": steps}}
    place = {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)}
    return {
        "id": number + 1, "type": "timeseries", "title": one["title"], "datasource": source, "gridPos": place,
        "targets": targets, "fieldConfig": {"defaults": defaults, "overrides": []},
    }  # fmt: skip
