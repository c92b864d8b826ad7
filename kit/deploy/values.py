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
    flags, found = {name: getattr(config, name) for name in FLAGS}, _found(source, held)
    flags["max_model_len"] = held.answer.max_model_len
    if given.quantization != "fp8" or spec.quantization:  # other formats are their checkpoint's own
        del flags["quantization"]
    path = DATA / "models" / f"{spec.key}.json"
    hub = json.loads(path.read_text(encoding="utf-8"))["id"] if path.is_file() else model
    return {
        "gpu": card.key, "gpu_count": config.gpu_count, "replicas": replicas, "replicas_per_gpu": 1, "place": "local",
        "model": hub, "served_model_name": spec.key, "engine": config.engine, "engine_version": config.engine_version,
        "image": None, "flags": flags | {"max_num_seqs": _batch(source.case, held)} | found["flags"],
        "extra_arguments": [], "output_tokens_per_s": found["speed"], "provenance": found["provenance"],
    }  # fmt: skip


def _batch(case: Scenario, held: Held) -> int:
    """The largest batch whose decode step keeps the TPOT limit at the mean context, within the engine's default."""
    config, limit_s, context = held.memory.config, case.slo.get("tpot_s"), mean(case.growth_tokens)
    steps = step_time(held.memory.model, held.memory.gpu, config)
    low, high = 1, config.max_num_seqs
    while limit_s and low < high:
        rows = (low + high + 1) // 2
        low, high = (rows, high) if steps.step_s((), rows, int(rows * context)) <= limit_s else (low, rows - 1)
    return high


def _found(source: Source, held: Held) -> dict[str, Any]:
    """Flags and output tokens/s of this engine: the scenario's own, else of notebooks 05 and 04 where they ran."""
    tuned, provenance = dict(source.case.tuned), "measured"
    if not tuned or held.memory.model.key != catalog.model(source.case.model).key:
        tune, load = (_results(source, name, held) for name in ("05_tune_max_num_seqs", "04_load_test"))
        tuned = dict(tune["results"].get("recommended") or {}) if tune else {}
        measured = [one for one in (tune, load) if one and one["source"] != "emulator"]
        provenance = "measured" if measured else "modelled"
        if load in measured and load["results"]["gpu_count"] == held.memory.config.gpu_count:
            tuned["output_tokens_per_s"] = max(row["output_tokens_per_s"] or 0 for row in load["results"]["curve"])
    flags = {name: tuned[name] for name in FLAGS if tuned.get(name)}
    return {"flags": flags, "speed": tuned.get("output_tokens_per_s"), "provenance": provenance}


def _results(source: Source, notebook: str, held: Held) -> dict[str, Any] | None:
    """The results.json of a notebook of this scenario, None where it did not run for this model and GPU itself."""
    wanted = {"gpu": held.memory.gpu.key, "model": held.memory.model.key}
    path = (source.run or Path("/dev/null")) / wanted["gpu"] / notebook / "results.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own = Path(found["scenario"]).stem == source.case.key and wanted.items() <= found.items()
    own = own and found["results"].get("engine", source.engine) == source.engine
    return found if own and "note" not in found else None  # a note: run on a CPU in that GPU's place


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
        where = f"{values['gpu_count']} x {card.key}"
        raise UserError(f"{where} leaves {spec.key} no room for a session of {context:,} tokens")
    overhead, used = PROCESS_BYTES / card.memory_bytes, config.gpu_memory_utilization
    shared = ""
    if share > 1:
        if share * (used + overhead) > 1 or values["gpu_count"] > 1:
            told = f"flags.gpu_memory_utilization is {used:g}, at most {1 / share - overhead:.2f} fits"
            raise UserError(f"replicas_per_gpu {share}: each engine needs a share of its own on one GPU; {told}")
        alone = hold(spec, card, replace(asked, gpu_memory_utilization=None), Demand(context)).memory.kv_cache_tokens()
        shared = f"{share} engines on one {card.key} keep {share * memory.kv_cache_tokens():,} KV tokens, one engine "
        shared += f"alone {alone:,} (modelled): the weights are there {share} times"
    rows, given = min(config.max_num_seqs, room), values["output_tokens_per_s"]
    speed = rows / step_time(spec, card, config).step_s((), rows, int(rows * mean(case.growth_tokens)))
    factor, weights = fitted(spec, card, config).tpot_factor, memory.weights.size_bytes * values["gpu_count"]
    start, whole = start_up(weights, "network-volume"), held.answer.max_concurrent_sessions
    return {
        "config": config, "card_quantization": spec.quantization, "shared_kv": shared, "weights_gib": weights / GIB,
        "sessions": rows, "sessions_interval": tuple(int(n * room / whole) for n in held.sessions_interval),
        "kv_cache_tokens": memory.kv_cache_tokens(),
        "start_s": start.total_s(warm_host=True), "cold_s": start.total_s(),
        "speed": given or speed, "speed_interval": None if given else (speed / factor, speed * factor),
        "peak_requests_per_s": case.sessions / whole * speed / case.output_tokens_per_turn,
    }  # fmt: skip
