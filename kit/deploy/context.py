"""What the templates read: values made concrete as containers, addresses, upstreams and images."""

from collections import Counter
from collections.abc import Mapping
from math import ceil
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.deploy import watch
from kit.deploy.values import NODE_GPUS, facts
from kit.engine_config import engine_data
from kit.engines.launch import flag_arguments
from kit.errors import UserError, unknown
from kit.prices import book, find, own_prices
from kit.scenario import Scenario

TEMPLATES = DATA.parent / "docker" / "templates"
ROUTER_LOCK = DATA.parent / "requirements" / "deploy-router.lock"
PORT, GPU_PORT, EXPORTER_PORT = 8000, 9400, 9113
POINTS = 10  # least weight: a consistent hash puts 160 points on its ring for each unit
DEFAULTS = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "kv_cache_dtype": "auto"}
BALANCE = ("consistent-hash", "sticky-least-loaded", "sticky-round-robin")
Pools = list[dict[str, Any]]


def context(case: Scenario, architecture: str, target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Every name that templates may use."""
    data = load_yaml(DATA / "deploy.yaml")
    made: dict[str, Any] = {**values, "case": case, "architecture": architecture, "target": target}
    made["pools"] = pools = _pools(case, values, data, target == "kubernetes")
    made |= {"what": data["architectures"][architecture]["what"], "versions": data["versions"]}
    paid = [one["price"] and one["price"] * one["replicas"] for one in pools]
    made["sessions"] = sum(one["sessions"] * one["replicas"] for one in pools)
    made["gpus"] = dict(Counter(one["gpu"] for one in pools for _ in range(one["replicas"] * one["gpu_count"])))
    made["usd_per_hour"] = None if None in paid else round(sum(paid), 4)
    made["images"] = {
        name: one["image"] + (f"@{one['digest']}" if one["digest"] else "") for name, one in data["images"].items()
    }
    made["remotes"] = [one for one in pools if one["place"] == "remote"]
    included = {"counters": TEMPLATES / "monitoring" / "dcgm-counters.csv", "router_lock": ROUTER_LOCK}
    made |= {name: path.read_text(encoding="utf-8") for name, path in included.items()}
    made |= _edge(values["edge"], pools, architecture)
    made["warnings"] = _warnings(case, architecture, target, pools)
    return made | {"watch": _watch(case, target, made)}


def _edge(given: Mapping[str, Any], pools: Pools, architecture: str) -> dict[str, Any]:
    """What NGINX passes requests to: engines as one upstream, or a router that spreads them."""
    if given["balance"] not in BALANCE:
        raise unknown("edge.balance", given["balance"], BALANCE)
    if architecture != "single-node" and given["balance"] != BALANCE[0]:
        raise UserError(f"edge.balance {given['balance']} is for equal engines: single-node only, not {architecture}")
    edge = {**given, "status_port": 8081, "upstream": "engines", "upstream_port": None}
    upstreams: Pools = [{"name": "engines", "port": None, "pools": pools}]
    if architecture == "tiered":  # LiteLLM comes back to one port for each pool
        edge |= {"upstream": "litellm", "upstream_port": 4000}
        upstreams = [{"name": one["name"], "port": 8100 + place, "pools": [one]} for place, one in enumerate(pools)]
    elif given["balance"] == "sticky-least-loaded":
        edge |= {"upstream": "router", "upstream_port": PORT}
    for one in upstreams:
        slowest = min(pool["speed"] for pool in one["pools"])
        for pool in one["pools"]:
            pool["weight"] = round(POINTS * pool["speed"] / slowest)
            for engine in pool["engines"]:
                engine["weight"] = pool["weight"]
        one["engines"] = [engine for pool in one["pools"] for engine in pool["engines"]]
    return {"edge": edge, "upstreams": upstreams}


def _pools(case: Scenario, values: Mapping[str, Any], data: Mapping[str, Any], cluster: bool) -> Pools:
    """Pools with their containers; local engines take the host's GPUs in order, remote ones a machine each."""
    pools: Pools = []
    rows = own_prices(case.prices) + book()
    taken, machine = 0, 10  # GPUs of this host, last number of an address
    for name, given in values["pools"].items():
        one = {**given, "name": name, "tier": "burst" if name == "spot" else "warm", **facts(case, given)}
        one |= _container(one, data["engines"][one["engine"]], values["limits"]["drain_s"])
        for market in ("on_demand", "spot"):
            found = find(one["gpu"], market, rows)
            one[market] = found and round(found.usd_per_hour(market) * one["gpu_count"], 4)
        one["price"] = (one["tier"] == "burst" and one["spot"]) or one["on_demand"]  # of one engine
        one |= {"nodes": ceil(one["gpu_count"] / NODE_GPUS), "engines": []}
        for number in range(max(one["replicas"], values["scale"]["max_replicas"] if cluster else 0)):
            label = f"{'engine' if len(values['pools']) == 1 else name}-{number}"
            first, host = taken + number // one["replicas_per_gpu"] * one["gpu_count"], label
            if one["place"] == "remote":
                machine, first = machine + 1, 0
                host = f"{values['private_network']['subnet']}.{machine}"
            elif cluster:
                host = f"{label}.engine"  # a leader's name in the LeaderWorkerSet's own service
            gpus = [str(gpu) for gpu in range(first, first + one["gpu_count"])]
            own = {"name": label, "host": host, "port": PORT, "health_path": one["health_path"], "device_ids": gpus}
            one["engines"].append(own)
        if one["place"] == "local":
            taken += ceil(one["replicas"] / one["replicas_per_gpu"]) * one["gpu_count"]
        pools.append(one)
    return pools


def _container(pool: Mapping[str, Any], rule: Mapping[str, Any], drain_s: int) -> dict[str, Any]:
    """Image, entry point, arguments and environment of one engine's container."""
    data = engine_data(pool["engine"])
    flags = {
        key: value for key, value in pool["flags"].items() if data["flags"].get(key) and value != DEFAULTS.get(key)
    }
    arguments, variables = flag_arguments(pool["engine"], flags)
    fields = {"model": pool["model"], "name": pool["served_model_name"], "drain_s": drain_s}
    path = data["start"]["health"]
    gpus = min(pool["gpu_count"], NODE_GPUS)
    return {
        "image": pool["image"] or data["start"]["image"].format(version=pool["engine_version"]),
        "entrypoint": rule["entrypoint"], "environment": rule["environment"] | variables, "user": rule["user"],
        "arguments": [part.format(**fields) for part in rule["arguments"]] + arguments + list(pool["extra_arguments"]),
        "fetch": [part.format(**fields) for part in rule["fetch"]],
        "health": [part.format(path=path) for part in rule["health"]], "health_path": path,
        "cache_volume": f"{pool['name']}-cache", "start_period_s": ceil(2 * pool["start_s"][1]),
        "shm_gib": 8 * gpus, "host_cpus": 8 * gpus, "host_memory_gib": ceil((pool["weights_gib"] + 24) / 8) * 8,
        "dstack_gpu": _dstack_gpu(pool["gpu"], pool["gpu_count"]),
    }  # fmt: skip


def _dstack_gpu(key: str, count: int) -> str:
    """A GPU as dstack asks for it.

    >>> _dstack_gpu("h100-sxm-80gb", 2), _dstack_gpu("rtx-5090-32gb", 1)
    ('H100:80GB:2', 'RTX5090:32GB:1')
    """
    words = key.split("-")
    name = "".join(words[:2]) if words[0] == "rtx" else words[0]
    return f"{name.upper()}:{words[-1].upper()}:{count}"


def _warnings(case: Scenario, architecture: str, target: str, pools: Pools) -> list[str]:
    """What a reader of the bundle must know before starting it."""
    told = []
    held = sum(one["sessions"] * one["replicas"] for one in pools)
    if held < case.sessions:
        told.append(f"these engines hold {held:,} of the scenario's {case.sessions:,} sessions at full context")
    for model in sorted({role.model for role in case.models} - {one["served_model_name"] for one in pools}):
        told.append(f"the scenario's {model} is not served here: it needs a bundle of its own")
    here = sum(one["replicas"] * one["gpu_count"] for one in pools if one["place"] == "local")
    if target == "compose" and here > NODE_GPUS:
        raise UserError(f"{architecture}: {here} GPUs on one host, which has at most {NODE_GPUS}: lower replicas")
    for one in pools:
        asked = one["config"].quantization
        if asked not in ("bf16", "fp8") and asked != one["card_quantization"]:
            told.append(f"{one['name']}: {asked} weights need a checkpoint of their own: set pools.{one['name']}.model")
        if one["replicas_per_gpu"] > 1:
            told.append(f"{one['name']}: {one['shared_kv']}")
    return told


def _watch(case: Scenario, target: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Who is scraped, and the limits that alerts compare with."""
    pools: Pools = made["pools"]
    targets: dict[str, list[dict[str, str]]] = {"engine": [], "gpu": []}
    targets["edge"] = [{"address": f"edge-exporter:{EXPORTER_PORT}", "tier": "warm", "gpu": "none"}]
    for pool in pools:
        label = {"tier": pool["tier"], "gpu": pool["gpu"]}
        for one in pool["engines"]:
            host = one["host"] if pool["place"] == "remote" else "gpu-exporter"
            targets["engine"].append({"address": f"{one['host']}:{one['port']}", **label})
            if not any(other["address"] == f"{host}:{GPU_PORT}" for other in targets["gpu"]):
                targets["gpu"].append({"address": f"{host}:{GPU_PORT}", **label})
    usd = {one["tier"]: one["price"] for one in pools if one["price"]}
    slo = {name: case.slo.get(name) or 1e9 for name in ("ttft_s", "tpot_s")}
    gpus = sum(pool["replicas"] * pool["gpu_count"] for pool in pools if pool["tier"] == "warm")
    router = {"address": "router:29000", "circuit": "vllm_router_cb_state"}  # it is vllm-router's own
    engine, start_s = pools[0], max(pool["start_s"][1] for pool in pools)
    return watch.context(
        engine["engine"], engine["engine_version"], targets, slo, gpus=gpus, start_s=start_s, usd_per_hour=usd,
        kubernetes=target == "kubernetes", router=router if made["edge"]["upstream"] == "router" else None,
    )  # fmt: skip
