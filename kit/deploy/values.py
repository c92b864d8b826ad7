"""The numbers of a bundle: from the scenario, from what its run measured, and from what the user changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from statistics import mean
from typing import Any

from kit import catalog
from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig
from kit.errors import UserError, unknown
from kit.memory.packing import PROCESS_BYTES
from kit.memory.sessions import Demand, alternatives
from kit.memory.startup import start_up
from kit.prices import book, find, own_prices
from kit.scenario import COUNTS, Held, Scenario, hold, parallel
from kit.steptime import fitted, step_time
from kit.units import GIB

NODE_GPUS = COUNTS[-1]
NODES = (2 * NODE_GPUS, 3 * NODE_GPUS, 4 * NODE_GPUS)  # where a model fits no single node
TIER_TOKENS = 8192  # longer requests are not simple: LiteLLM passes them to the large model
MACHINES = 64  # of a private network
MEASURED = {"provenance": "measured"}
FLAGS = (
    "tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype", "gpu_memory_utilization",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Where a bundle's numbers come from: a scenario, and the folder of its walkthrough if it has run."""

    case: Scenario
    gpu: str | None = None  # as asked for
    engine: str = "vllm"
    run: Path | None = None

    @property
    def fleet(self) -> dict[str, Any]:
        """data/fleet.yaml's defaults with the scenario's own `fleet` over them."""
        return {**load_yaml(DATA / "fleet.yaml")["defaults"], **self.case.fleet}


def defaults(source: Source, architecture: str) -> dict[str, Any]:
    """What values.yaml starts with: pools of engines, the edge, monitoring, limits."""
    data, streams = load_yaml(DATA / "deploy.yaml"), max(256, 2 * source.case.sessions)
    edge = data["edge"] | {"connections_per_key": streams, "requests_per_s_per_key": ceil(streams / 10)}
    rest = {name: dict(data[name]) for name in ("monitoring", "limits")}
    return {"pools": _pools(source, architecture), "edge": edge, **rest, **data["extra"].get(architecture, {})}


def _pools(source: Source, architecture: str) -> dict[str, Any]:
    case, own, gpu = source.case, source.fleet, chosen_gpu(source, architecture)
    if architecture == "burst":
        warm = pool(source, case.model, gpu, case.sessions, (case.gpu_count,))
        left = max(1, case.sessions - facts(case, warm | {"replicas": 1})["sessions"])
        spot = pool(source, case.model, own["burst_gpu"] or "rtx-5090-32gb", left, (case.gpu_count,))
        return {"dedicated": warm | {"replicas": 1}, "spot": spot | remote(spot)}
    if architecture == "tiered":
        few = max(1, ceil((1 - own["tier_fraction"]) * case.sessions))
        short = replace(source, case=case.model_copy(update={"context_tokens": min(TIER_TOKENS, case.context_tokens)}))
        small = pool(short, own["tier_model"], own["tier_gpu"], max(1, case.sessions - few), (1,))
        return {"small": small | remote(small), "large": pool(source, case.model, gpu, few)}
    counts = (*COUNTS, *NODES) if architecture == "multi-node" else COUNTS
    main = pool(source, case.model, gpu, case.sessions, counts)
    most = main["replicas"] if architecture == "multi-node" else NODE_GPUS // main["gpu_count"]
    return {"main": main | {"replicas": min(most, main["replicas"])}}


def remote(values: Mapping[str, Any]) -> dict[str, Any]:
    """A pool on machines of its own, as many as one private network takes."""
    return {"place": "remote", "replicas": min(MACHINES, values["replicas"])}


def chosen_gpu(source: Source, architecture: str) -> str:
    """The GPU asked for; else an H100 where burst and tiers want one, else the cheapest where one engine takes few."""
    case = source.case
    if asked := source.gpu or source.fleet["gpu"]:
        return catalog.gpu(asked).key
    if architecture in ("burst", "tiered"):
        return next((key for key in case.gpus if key.startswith("h100")), "h100-sxm-80gb")
    rows, spec = own_prices(case.prices) + book(), catalog.model(case.model)

    def cost(key: str) -> tuple[bool, int, float]:
        try:
            held, replicas = _split(source, spec, catalog.gpu(key), case.sessions)
        except UserError:
            return True, NODE_GPUS, inf
        price, count = find(key, "on_demand", rows), held.memory.config.gpu_count
        usd = price.usd_per_hour("on_demand") if price else inf
        return replicas * count > NODE_GPUS, count, replicas * count * usd

    return min(case.gpus or ("h100-sxm-80gb",), key=cost)


def _split(
    source: Source, spec: ModelSpec, gpu: GpuSpec, sessions: int, counts: Sequence[int] = COUNTS
) -> tuple[Held, int]:
    """A replica, and how many hold the sessions on the fewest GPUs; refused where the model leaves no room."""
    case, least = source.case, min(source.fleet["min_sessions"], sessions)
    asked, demand = _config(case, spec, source.engine), Demand(min(case.context_tokens, spec.max_position_embeddings))
    held = [hold(spec, gpu, _shaped(spec, asked, count), demand) for count in counts]
    fit = [one for one in held if _room(case, one) >= least]
    if not fit:
        other = ", ".join(
            alternatives(spec, gpu, replace(asked, gpu_count=counts[-1]), replace(demand, sessions=least))
        )
        told = f"{counts[-1]} x {gpu.key} leaves {spec.key} room for {_room(case, held[-1])} sessions of "
        told += f"{demand.context_tokens:,} tokens"
        raise UserError(f"{told}, fewer than {least}; would fit: {other or 'nothing that was tried'}")

    def rank(one: Held) -> tuple[int, int]:  # one engine per GPU, unless a node does not hold so many
        count = one.memory.config.gpu_count
        gpus = -(-sessions // _capacity(case, one)) * count
        return gpus if gpus > NODE_GPUS else 0, count

    best = min(fit, key=rank)
    return best, -(-sessions // _capacity(case, best))


def _shaped(spec: ModelSpec, config: EngineConfig, count: int) -> EngineConfig:
    """Tensor parallel inside a node, pipeline parallel over nodes."""
    if count <= NODE_GPUS:
        return parallel(spec, replace(config, gpu_count=count))
    nodes = count // NODE_GPUS
    return replace(config, gpu_count=count, tensor_parallel_size=NODE_GPUS, pipeline_parallel_size=nodes)


def _capacity(case: Scenario, held: Held) -> int:
    """Sessions of one engine, by memory and by the TPOT limit."""
    return min(_room(case, held), _batch(case, held))


def _room(case: Scenario, held: Held) -> int:
    """Active sessions whose KV cache one engine holds, each with its share of the paused ones."""
    return int(held.answer.max_concurrent_sessions / (1 + case.paused_sessions / case.sessions))


def _config(case: Scenario, spec: ModelSpec, engine: str) -> EngineConfig:
    """The engine's flags for that model; the scenario's quantization is its own model's."""
    own, rule = spec.key == catalog.model(case.model).key, load_yaml(DATA / "deploy.yaml")["engines"]
    config = case.config(spec, engine=engine, **rule.get(engine, {}).get("flags", {}))
    return config if own else replace(config, quantization=None)


def pool(source: Source, model: str, gpu: str, sessions: int, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """One pool of equal engines as values.yaml holds it, sized for so many sessions."""
    spec, card = catalog.model(model), catalog.gpu(gpu)
    held, replicas = _split(source, spec, card, sessions, counts)
    config, given = held.memory.config, _config(source.case, spec, source.engine)
    flags, found = {name: getattr(config, name) for name in FLAGS}, _found(source, spec, card)
    flags["max_model_len"] = held.answer.max_model_len
    if given.quantization != "fp8" or spec.quantization:  # other formats are their checkpoint's own
        del flags["quantization"]
    path = DATA / "models" / f"{spec.key}.json"
    return {
        "gpu": card.key,
        "gpu_count": config.gpu_count,
        "replicas": replicas,
        "replicas_per_gpu": 1,
        "place": "local",
        "model": json.loads(path.read_text(encoding="utf-8"))["id"] if path.is_file() else model,
        "served_model_name": spec.key,
        "engine": config.engine,
        "engine_version": config.engine_version,
        "image": None,
        "flags": flags | {"max_num_seqs": _batch(source.case, held)} | found["flags"],
        "extra_arguments": [],
        "output_tokens_per_s": found["output_tokens_per_s"],
        "provenance": found["provenance"],
    }


def _batch(case: Scenario, held: Held) -> int:
    """The largest batch whose decode step keeps the TPOT limit at the mean context, within the engine's default."""
    config, limit_s, context = held.memory.config, case.slo.get("tpot_s"), mean(case.growth_tokens)
    steps = step_time(held.memory.model, held.memory.gpu, config)
    low, high = 1, config.max_num_seqs
    while limit_s and low < high:
        rows = (low + high + 1) // 2
        low, high = (rows, high) if steps.step_s((), rows, int(rows * context)) <= limit_s else (low, rows - 1)
    return high


def _found(source: Source, spec: ModelSpec, card: GpuSpec) -> dict[str, Any]:
    """Tuned flags and capacity of this model on this GPU: the scenario's own, else of notebooks 05 and 04."""
    told: dict[str, Any] = {"flags": {}, "output_tokens_per_s": None, "provenance": "modelled"}
    if source.case.tuned and spec.key == catalog.model(source.case.model).key:
        flags = {name: value for name, value in source.case.tuned.items() if name in FLAGS}
        return told | {"flags": flags, "output_tokens_per_s": source.case.tuned.get("output_tokens_per_s")} | MEASURED
    tune, load = (_results(source, name, spec, card) for name in ("05_tune_max_num_seqs", "04_load_test"))
    if tune:
        recommended = tune["results"].get("recommended") or {}
        told["flags"] = {name: value for name, value in recommended.items() if name in FLAGS}
    if load:
        told["output_tokens_per_s"] = max(row["output_tokens_per_s"] or 0 for row in load["results"]["curve"]) or None
    live = [one for one in (tune, load) if one and one["source"] != "emulator" and "note" not in one]
    return told | (MEASURED if live else {})


def _results(source: Source, notebook: str, spec: ModelSpec, card: GpuSpec) -> dict[str, Any] | None:
    """The results.json of a notebook of this scenario's run, None where it has not run for this model and GPU."""
    for folder in (source.run / card.key, source.run) if source.run else ():
        path = folder / notebook / "results.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same = Path(found["scenario"]).stem == source.case.key
            if same and (found["gpu"], found["model"]) == (card.key, spec.key):
                return found
    return None


def facts(case: Scenario, values: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from a pool's values: sessions, KV tokens, speed and start-up; refuses what cannot start."""
    spec, card, flags = catalog.model(values["model"]), catalog.gpu(values["gpu"]), values["flags"]
    share = values["replicas_per_gpu"]
    if wrong := flags.keys() - EngineConfig.__slots__:
        raise unknown("flag", min(wrong), FLAGS)
    same = {name: values[name] for name in ("engine", "engine_version", "gpu_count")}
    asked = EngineConfig(**{**same, "quantization": _config(case, spec, "vllm").quantization, **flags})
    context = min(case.context_tokens, flags["max_model_len"])
    held = hold(spec, card, asked, Demand(context))
    memory, config, room = held.memory, held.memory.config, _room(case, held)
    if not room:
        raise UserError(
            f"{values['gpu_count']} x {card.key} leaves {spec.key} no room for a session of {context:,} tokens"
        )
    taken = share * (config.gpu_memory_utilization + PROCESS_BYTES / card.memory_bytes * (share > 1))
    if taken > 1 or (share > 1 and values["gpu_count"] > 1):
        most = 1 / share - PROCESS_BYTES / card.memory_bytes
        raise UserError(
            f"replicas_per_gpu {share}: each engine needs a share of its own on one GPU; flags.gpu_memory_utilization "
            f"is {config.gpu_memory_utilization:g}, at most {most:.2f} fits"
        )
    shared = ""
    if share > 1:
        alone = hold(spec, card, replace(asked, gpu_memory_utilization=None), Demand(context)).memory
        shared = (
            f"{share} engines on one {card.key} keep {share * memory.kv_cache_tokens():,} KV tokens, one engine alone "
        )
        shared += f"{alone.kv_cache_tokens():,} (modelled): the weights are there {share} times"
    rows, tokens = min(config.max_num_seqs, room), int(mean(case.growth_tokens))
    speed = rows / step_time(spec, card, config).step_s((), rows, rows * tokens)
    factor = fitted(spec, card, config).tpot_factor
    weights = memory.weights.size_bytes * values["gpu_count"]
    start = start_up(weights, "network-volume")
    return {
        "card": card,
        "config": config,
        "sessions": min(room, config.max_num_seqs),
        "sessions_interval": tuple(int(n * room / held.answer.max_concurrent_sessions) for n in held.sessions_interval),
        "kv_cache_tokens": memory.kv_cache_tokens(),
        "speed": values["output_tokens_per_s"] or speed,
        "speed_interval": None if values["output_tokens_per_s"] else (speed / factor, speed * factor),
        "shared_kv": shared,
        "card_quantization": spec.quantization,
        "weights_gib": weights / GIB,
        "start_s": start.total_s(warm_host=True),
        "cold_s": start.total_s(),
        "peak_requests_per_s": case.sessions
        / held.answer.max_concurrent_sessions
        * speed
        / case.output_tokens_per_turn,
    }
