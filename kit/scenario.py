"""A scenario: the agents of one user, written down once, and what a GPU holds of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog import gpu as find_gpu
from kit.catalog import model as find_model
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig, tensor_parallel_sizes
from kit.errors import UserError
from kit.memory import MemoryPlan, plan
from kit.memory.packing import Packing, pack
from kit.memory.sessions import (
    Answer,
    Demand,
    alternatives,
    answer,
    context_by_turn,
    engine_args,
)
from kit.memory.shape import Term
from kit.units import GIB

COUNTS = (1, 2, 4, 8)  # GPUs of one replica that are tried, one node at most


class Strict(BaseModel):
    """Immutable, and an unknown field is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Role(Strict):
    """One engine of a scenario that runs several."""

    role: str
    model: str
    sessions: PositiveInt
    context_tokens: PositiveInt


class Scenario(Strict):
    """The fields of data/scenarios/*.yaml; data/README.md says what each means."""

    model: str
    sessions: PositiveInt
    context_tokens: PositiveInt
    key: str = "own"
    title: str = "My scenario"
    question: str = ""
    source: str = ""
    date: str = ""
    models: tuple[Role, ...] = ()
    quantization: str | None = None
    gpus: tuple[str, ...] = ()
    gpu_count: PositiveInt = 1
    paused_sessions: NonNegativeInt = 0
    turns: PositiveInt = 1
    input_tokens_first_turn: PositiveInt = 1000
    tokens_added_per_turn: NonNegativeInt = 200
    output_tokens_per_turn: PositiveInt = 200
    arrivals: dict[str, Any] = {"kind": "steady"}
    slo: dict[str, float | None] = {"ttft_s": 0.5, "tpot_s": 0.05, "e2el_s": None}
    conversations_per_day: PositiveInt | None = None
    workload: str = ""
    assumed: tuple[str, ...] = ()
    notes: str = ""

    @property
    def growth_tokens(self) -> list[int]:
        """Context after each turn, tokens."""
        first, added = self.input_tokens_first_turn, self.tokens_added_per_turn
        return context_by_turn(first, added, self.output_tokens_per_turn, self.turns)

    def demand(self, headroom_fraction: float = 0.0) -> Demand:
        """The sessions to hold at their longest context."""
        return Demand(
            context_tokens=self.context_tokens,
            sessions=self.sessions,
            paused_sessions=self.paused_sessions,
            headroom_fraction=headroom_fraction,
        )

    def config(self, spec: ModelSpec, **flags: Any) -> EngineConfig:
        """The engine's flags for it: requests no longer than its longest context."""
        length = min(self.context_tokens, spec.max_position_embeddings)
        given = {name: value for name, value in flags.items() if value}
        return EngineConfig(**{"quantization": self.quantization, "max_model_len": length, **given})


def load(name: str | Path) -> Scenario:
    """The scenario of a file, or of a key of data/scenarios."""
    bundled = {path.stem: path for path in sorted((DATA / "scenarios").glob("*.yaml"))}
    path = bundled.get(str(name), Path(name))
    if not path.is_file():
        raise UserError(f"scenario {str(name)!r}: no such file; bundled: {', '.join(bundled)}")
    record = load_yaml(path)
    if not isinstance(record, dict):
        raise UserError(f"scenario {path}: not a mapping of names to values")
    try:
        return Scenario(**{"key": path.stem, **record})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"scenario {path}: {where}: {first['msg'].lower()}") from None


@dataclass(frozen=True, slots=True)
class Held:
    """What one replica holds, with the 90 % interval of the sessions."""

    memory: MemoryPlan
    answer: Answer
    sessions_interval: tuple[int, int]


def hold(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> Held:
    """Memory, answer and interval of one replica on config.gpu_count GPUs."""
    memory = plan(spec, gpu, parallel(spec, config))
    low, high = (
        answer(replace(memory, pool=Term(size, 0.0)), demand).max_concurrent_sessions
        for size in memory.kv_cache_bytes_interval
    )
    return Held(memory, answer(memory, demand), (low, high))


def parallel(spec: ModelSpec, config: EngineConfig) -> EngineConfig:
    """The GPUs split into the largest TP that can run, times PP; kept where the user chose.

    >>> parallel(find_model("llama-3.1-70b"), EngineConfig(gpu_count=3)).pipeline_parallel_size
    3
    """
    if config.tensor_parallel_size or config.pipeline_parallel_size > 1:
        return config
    sizes = tensor_parallel_sizes(spec, config.gpu_count)
    tensor = max(size for size in sizes if config.gpu_count % size == 0)
    stages = config.gpu_count // tensor
    return replace(config, tensor_parallel_size=tensor, pipeline_parallel_size=stages)


def smallest_count(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> Held | None:
    """The fewest GPUs of that kind that hold the demand, None where eight do not."""
    for count in COUNTS:
        held = hold(spec, gpu, replace(config, gpu_count=count), demand)
        if held.answer.fits:
            return held
    return None


def pack_roles(scenario: Scenario, gpu: GpuSpec, config: EngineConfig) -> list[Packing]:
    """Every role's own engine, dealt over the scenario's GPUs; one packing per GPU."""
    engines = [
        (
            find_model(role.model),
            replace(config, gpu_count=1, max_model_len=role.context_tokens),
            Demand(context_tokens=role.context_tokens, sessions=role.sessions),
        )
        for role in scenario.models
    ]
    count = min(config.gpu_count, len(engines))
    return [pack(gpu, engines[first::count]) for first in range(count)]


HEADINGS = {
    "gpu": "GPU", "count": "GPUs", "split": "split", "fits": "fits", "sessions": "sessions", "interval": "90 %",
    "limited_by": "limited by", "kv_pool_gib": "KV pool GiB", "provenance": "provenance",
}  # fmt: skip


def row(case: Scenario, spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """One line of the answer for a scenario; where it runs several engines, all of them side by side."""
    if not case.models or spec.key != find_model(case.model).key:
        return hold_row(spec, gpu, config, demand)
    packed = pack_row(case, gpu, config)
    limit = f"{packed['GiB left']:+.1f} GiB left"
    kept = {name: packed[name] for name in ("gpu", "count", "fits", "sessions", "provenance")}
    return kept | {"limited_by": limit, "provenance": "modelled"}


def hold_row(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """Does that GPU hold the demand, how many sessions, what limits them: a line of a table, see HEADINGS."""
    one = hold(spec, gpu, config, demand)
    resolved = one.memory.config
    sizes = {"TP": resolved.tensor_parallel_size, "PP": resolved.pipeline_parallel_size}
    return {
        "gpu": gpu.key,
        "count": resolved.gpu_count,
        "split": " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "-",
        "fits": one.answer.fits,
        "sessions": one.answer.max_concurrent_sessions,
        "interval": "{} to {}".format(*one.sessions_interval),
        "limited_by": one.answer.limited_by,
        "kv_pool_gib": one.memory.pool.size_bytes * resolved.gpu_count / GIB,
        "provenance": "modelled",
    }


def pack_row(case: Scenario, gpu: GpuSpec, config: EngineConfig) -> dict[str, Any]:
    """Whether the scenario's separate engines fit, with the share of each: a line of a table."""
    packings = pack_roles(case, gpu, config)
    fits = all(packing.fits for packing in packings)
    shares = [share for packing in packings for share in packing.shares]
    return {
        "gpu": gpu.key,
        "count": config.gpu_count,
        "shares": " + ".join(f"{share.gpu_memory_utilization:.3f}" for share in shares),
        "GiB left": min(packing.leftover_bytes for packing in packings) / GIB,
        "fits": fits,
        "sessions": sum(share.sessions for share in shares) if fits else 0,
        "provenance": "modelled",
    }


def decide(case: Scenario, spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """The decision on one kind of GPU: what was asked, and the fewest GPUs that hold it."""
    asked = hold(spec, gpu, config, demand)
    fewest = smallest_count(spec, gpu, config, demand)
    rows = [row(case, spec, find_gpu(key), config, demand) for key in case.gpus]
    changes = [] if asked.answer.fits else list(alternatives(spec, gpu, config, demand))
    return {
        "asked": _chosen(asked, config),
        "recommended": _chosen(fewest, config) if fewest else None,
        "would_fit": changes,
        "fitting_gpus": [one["gpu"] for one in rows if one["fits"]],
        "separate_engines": _shares(case, gpu, config),
    }


def _chosen(held: Held, given: EngineConfig) -> dict[str, Any]:
    config, low_high = held.memory.config, list(held.sessions_interval)
    return {
        "gpu_count": config.gpu_count,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "fits": held.answer.fits,
        "sessions": held.answer.max_concurrent_sessions,
        "sessions_interval": low_high,
        "limited_by": held.answer.limited_by,
        "kv_cache_tokens": held.memory.kv_cache_tokens(),
        "engine_args": engine_args(held.memory, held.answer, given),
    }


def _shares(case: Scenario, gpu: GpuSpec, config: EngineConfig) -> list[dict[str, Any]]:
    """The engines of a scenario that runs several, with the GPU and the share of each."""
    return [
        {
            "gpu": number,
            "fits": packing.fits,
            "model": share.model.key,
            "gpu_memory_utilization": share.gpu_memory_utilization,
            "sessions": share.sessions,
        }
        for number, packing in enumerate(pack_roles(case, gpu, config) if case.models else [])
        for share in packing.shares
    ]


def sentences(case: Scenario, gpu: GpuSpec, demand: Demand, decision: Mapping[str, Any]) -> list[str]:
    """The decision in a few lines of plain text."""
    asked, best = decision["asked"], decision["recommended"]
    wanted = demand.sessions + demand.paused_sessions
    lines = [f"{case.title}: {wanted} sessions of {demand.context_tokens:,} tokens."]
    lines.append(f"Asked, {_told(asked, gpu)}: {'fits' if asked['fits'] else 'does not fit'}.")
    if best:
        lines.append(f"Recommended, {_told(best, gpu)}.")
        lines.append("Flags: " + " ".join(f"{flag} {value}".strip() for flag, value in best["engine_args"].items()))
        longest = best["kv_cache_tokens"] // wanted
        lines.append(f"Room to grow: its pool holds {wanted} sessions of up to {longest:,} tokens each.")
    else:
        lines.append(f"Up to {COUNTS[-1]}x {gpu.key} do not hold them on one replica at these dtypes.")
    if not asked["fits"]:
        lines.append(f"Would fit: {'; '.join(decision['would_fit']) or 'nothing tried here'}.")
    lines.append(f"Of the scenario's GPUs these fit as asked: {_listed(decision['fitting_gpus'])}.")
    if shares := decision["separate_engines"]:
        fits = "fit" if all(share["fits"] for share in shares) else "do not fit"
        parts = ", ".join(f"{s['model']} {s['gpu_memory_utilization']:.3f}" for s in shares)
        lines.append(f"As separate engines on {case.gpu_count}x {gpu.key} they {fits}: {parts}.")
    return lines


def _told(chosen: Mapping[str, Any], gpu: GpuSpec) -> str:
    low, high = chosen["sessions_interval"]
    sessions = f"{chosen['sessions']} sessions (90 % {low} to {high}), limited by {chosen['limited_by']}"
    return f"{chosen['gpu_count']}x {gpu.key}: {sessions}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
