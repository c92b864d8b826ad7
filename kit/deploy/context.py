"""What the templates read: values made concrete as containers, addresses, upstreams and images."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.deploy import watch
from kit.deploy.values import facts
from kit.engine_config import engine_data
from kit.engines.launch import flag_arguments
from kit.prices import book, find, own_prices
from kit.scenario import Scenario

PORT = 8000
GPU_PORT = 9400
POINTS = 10  # least weight: a consistent hash puts 160 points on its ring for each unit
DEFAULTS = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "kv_cache_dtype": "auto"}


def context(case: Scenario, architecture: str, target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Every name that templates may use."""
    data = load_yaml(DATA / "deploy.yaml")
    pools = _pools(case, values, data)
    edge = dict(values["edge"])
    edge["listen"] = edge["port"]
    edge |= {"status_port": 8081, "upstream": "engines", "upstream_port": None}
    if architecture == "tiered":
        edge |= {"upstream": "litellm", "upstream_port": 4000}
        upstreams = [{"name": one["name"], "port": 8100 + place, "pools": [one]} for place, one in enumerate(pools)]
    else:
        upstreams = [{"name": "engines", "port": None, "pools": pools}]
        if edge["balance"] == "sticky-least-loaded":
            edge |= {"upstream": "router", "upstream_port": PORT}
    for one in upstreams:
        one["engines"] = [engine for pool in one["pools"] for engine in pool["engines"]]
    images = {name: _pinned(one["image"], one["digest"]) for name, one in data["images"].items()}
    made = {**values, "edge": edge, "pools": pools, "upstreams": upstreams, "images": images, "case": case}
    made |= {"title": case.title, "architecture": architecture, "target": target, "versions": data["versions"]}
    made |= {
        "remotes": [one for one in pools if one["place"] == "remote"],
        "what": data["architectures"][architecture]["what"],
    }
    return made | {"watch": _watch(case, target, made)}


def _pools(case: Scenario, values: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pools with their containers; local engines take the host's GPUs in order, remote ones a machine each."""
    pools, first_gpu, machines = [], 0, 10
    subnet = values.get("private_network", {}).get("subnet")
    for name, given in values["pools"].items():
        one = {**given, "name": name, "tier": "burst" if name == "spot" else "warm", **facts(case, given)}
        one |= _container(one, data["engines"][one["engine"]], values["limits"]["drain_s"])
        stem = "engine" if len(values["pools"]) == 1 else name
        one["engines"] = []
        for number in range(one["replicas"]):
            own = {
                "name": f"{stem}-{number}",
                "host": f"{stem}-{number}",
                "port": PORT,
                "health_path": one["health_path"],
            }
            begin = first_gpu + number // one["replicas_per_gpu"] * one["gpu_count"]
            if one["place"] == "remote":
                machines, begin = machines + 1, 0
                own["host"] = f"{subnet}.{machines}"
            own["device_ids"] = [str(gpu) for gpu in range(begin, begin + one["gpu_count"])]
            one["engines"].append(own)
        first_gpu += ceil(one["replicas"] / one["replicas_per_gpu"]) * one["gpu_count"] * (one["place"] == "local")
        pools.append(one)
    slowest = min(one["speed"] for one in pools)
    for one in pools:
        one["weight"] = round(POINTS * one["speed"] / slowest)
        one["engines"] = [{**own, "weight": one["weight"]} for own in one["engines"]]
    return pools


def _container(pool: Mapping[str, Any], rule: Mapping[str, Any], drain_s: int) -> dict[str, Any]:
    """Image, entry point, arguments and environment of one engine's container."""
    engine = pool["engine"]
    data, names = engine_data(engine), engine_data(engine)["flags"]
    flags = {key: value for key, value in pool["flags"].items() if names.get(key) and value != DEFAULTS.get(key)}
    arguments, variables = flag_arguments(engine, flags)
    fields = {"model": pool["model"], "name": pool["served_model_name"], "drain_s": drain_s}
    path = data["start"]["health"]
    fetch = [part.format(**fields) for part in rule["fetch"]]
    return {
        "image": pool["image"] or data["start"]["image"].format(version=pool["engine_version"]),
        "entrypoint": rule["entrypoint"],
        "arguments": [part.format(**fields) for part in rule["arguments"]] + arguments + list(pool["extra_arguments"]),
        "environment": rule["environment"] | variables,
        "fetch": fetch,
        "health": [part.format(path=path) for part in rule["health"]],
        "health_path": path,
        "cache_volume": f"{pool['name']}-cache",
        "shm": f"{8 * pool['gpu_count']}g",
        "start_period_s": ceil(2 * pool["start_s"][1]),
        "host_cpus": 8 * pool["gpu_count"],
        "host_memory": f"{ceil((pool['weights_gib'] + 24) / 8) * 8}g",
        "user": rule["user"],
    }


def _pinned(image: str, digest: str | None) -> str:
    return f"{image}@{digest}" if digest else image


def _watch(case: Scenario, target: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Who is scraped, and the limits that alerts compare with."""
    pools, rows = made["pools"], own_prices(case.prices) + book()
    engines = [(one, pool) for pool in pools for one in pool["engines"]]
    labels = [{"tier": pool["tier"], "gpu": pool["gpu"]} for _, pool in engines]
    targets = {
        "engine": [{"address": f"{one['host']}:{one['port']}", **label} for (one, _), label in zip(engines, labels)]
    }
    targets["edge"] = [{"address": "edge-exporter:9113", "tier": "warm", "gpu": "none"}]
    hosts = {("gpu-exporter" if pool["place"] == "local" else one["host"]): label
             for (one, pool), label in zip(engines, labels)}  # fmt: skip
    targets["gpu"] = [{"address": f"{host}:{GPU_PORT}", **label} for host, label in hosts.items()]
    usd = {}
    for pool in pools:
        market = "spot" if pool["tier"] == "burst" else "on_demand"
        price = find(pool["gpu"], market, rows) or find(pool["gpu"], "on_demand", rows)
        if price:
            found = getattr(price, market) or price.on_demand
            usd[pool["tier"]] = round(found * (1 - price.discount_fraction) * pool["gpu_count"], 4)
    slo = {name: case.slo.get(name) or 1e9 for name in ("ttft_s", "tpot_s")}
    gpus = sum(pool["replicas"] * pool["gpu_count"] for pool in pools)
    start_s = max(pool["start_s"][1] for pool in pools)
    return watch.context(
        pools[0]["engine"], pools[0]["engine_version"], targets, slo, gpus=gpus, start_s=start_s, usd_per_hour=usd,
        kubernetes=target == "kubernetes",
    )  # fmt: skip
