"""A scenario: the agents of one user, written down once, and what a GPU holds of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog import model as find_model
from kit.catalog.paths import DATA, load_yaml
from kit.engine_config import EngineConfig, tensor_parallel_sizes
from kit.errors import UserError
from kit.memory import MemoryPlan, plan
from kit.memory.packing import Packing, pack
from kit.memory.sessions import Answer, Demand, answer, context_by_turn
from kit.memory.shape import Term
from kit.units import gib

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
    workload: str = "simple-chat"
    assumed: tuple[str, ...] = ()
    prices: dict[str, dict[str, Any]] | str = {}
    fleet: dict[str, Any] = {}
    tuned: dict[str, float] = {}
    notes: str = ""

    @property
    def growth_tokens(self) -> list[int]:
        """Context after each turn, tokens."""
        first, added = self.input_tokens_first_turn, self.tokens_added_per_turn
        return context_by_turn(first, added, self.output_tokens_per_turn, self.turns)

    def demand(self, headroom_fraction: float = 0.0) -> Demand:
        """The sessions to hold at their longest context."""
        return Demand(self.context_tokens, self.sessions, self.paused_sessions, headroom_fraction)

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
        raise UserError(f"scenario {path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None


@dataclass(frozen=True, slots=True)
class Held:
    """What one replica holds, with the 90 % interval of the sessions."""

    memory: MemoryPlan
    answer: Answer
    sessions_interval: tuple[int, int]


def hold(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> Held:
    """Memory, answer and interval of one replica on config.gpu_count GPUs."""
    memory = plan(spec, gpu, parallel(spec, config))
    poor_and_rich = (replace(memory, pool=Term(size, 0.0)) for size in memory.kv_cache_bytes_interval)
    low, high = (answer(one, demand).max_concurrent_sessions for one in poor_and_rich)
    return Held(memory, answer(memory, demand), (low, high))


def parallel(spec: ModelSpec, config: EngineConfig) -> EngineConfig:
    """The GPUs split into the largest TP that can run, times PP; kept where the user chose.

    >>> parallel(find_model("llama-3.1-70b"), EngineConfig(gpu_count=3)).pipeline_parallel_size
    3
    """
    if config.tensor_parallel_size or config.pipeline_parallel_size > 1:
        return config
    tensor = max(size for size in tensor_parallel_sizes(spec, config.gpu_count) if config.gpu_count % size == 0)
    return replace(config, tensor_parallel_size=tensor, pipeline_parallel_size=config.gpu_count // tensor)


def smallest_count(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> Held | None:
    """The fewest GPUs of that kind that hold the demand, None where eight do not."""
    tried = (hold(spec, gpu, replace(config, gpu_count=count), demand) for count in COUNTS)
    return next((held for held in tried if held.answer.fits), None)


def pack_roles(scenario: Scenario, gpu: GpuSpec, config: EngineConfig) -> list[Packing]:
    """Every role's own engine, dealt over the scenario's GPUs; one packing per GPU."""
    engines = []
    for role in scenario.models:
        own = replace(config, gpu_count=1, max_model_len=role.context_tokens)
        engines.append((find_model(role.model), own, Demand(role.context_tokens, role.sessions)))
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
    return {name: packed[name] for name in HEADINGS if name in packed}


def hold_row(spec: ModelSpec, gpu: GpuSpec, config: EngineConfig, demand: Demand) -> dict[str, Any]:
    """Does that GPU hold the demand, how many sessions, what limits them: a line of a table, see HEADINGS."""
    one = hold(spec, gpu, config, demand)
    flags, found = one.memory.config, one.answer
    sizes = {"TP": flags.tensor_parallel_size, "PP": flags.pipeline_parallel_size}
    split = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "-"
    where = {"gpu": gpu.key, "count": flags.gpu_count, "split": split, "fits": found.fits}
    held = {"sessions": found.max_concurrent_sessions, "interval": "{} to {}".format(*one.sessions_interval)}
    pool_gib = gib(one.memory.pool.size_bytes) * flags.gpu_count
    return where | held | {"limited_by": found.limited_by, "kv_pool_gib": pool_gib, "provenance": "modelled"}


def pack_row(case: Scenario, gpu: GpuSpec, config: EngineConfig) -> dict[str, Any]:
    """Whether the scenario's separate engines fit, with the share of each: a line of a table."""
    packings = pack_roles(case, gpu, config)
    shares = [share for packing in packings for share in packing.shares]
    fits, left_gib = all(one.fits for one in packings), gib(min(one.leftover_bytes for one in packings))
    told = " + ".join(f"{share.gpu_memory_utilization:.3f}" for share in shares)
    where = {"gpu": gpu.key, "count": config.gpu_count, "shares": told, "GiB left": left_gib, "fits": fits}
    held = {"sessions": sum(share.sessions for share in shares) if fits else 0}
    return where | held | {"limited_by": f"{left_gib:+.1f} GiB left", "provenance": "modelled"}
