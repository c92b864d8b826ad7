"""From a memory plan to sessions: how many fit, what a number needs, what would hold it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from kit.catalog import GpuSpec, ModelSpec, gpu, gpu_keys
from kit.engine_config import EngineConfig, engine_data, tensor_parallel_sizes
from kit.errors import UserError, at_least
from kit.memory.plan import MemoryPlan, plan


@dataclass(frozen=True, slots=True)
class Demand:
    """Sessions to hold: active ones have a request in the engine, paused ones only their cache."""

    context_tokens: int
    sessions: int = 1
    paused_sessions: int = 0
    headroom_fraction: float = 0.0  # of the KV pool, left free

    def __post_init__(self) -> None:
        at_least(1, context_tokens=self.context_tokens, sessions=self.sessions)
        if self.paused_sessions < 0:
            raise UserError(f"--paused-sessions must not be negative, got {self.paused_sessions}")
        if not 0 <= self.headroom_fraction < 1:
            raise UserError(f"--headroom-fraction must lie from 0 to below 1, got {self.headroom_fraction}")


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the asked sessions fit on one replica, how many would, and which limit decides."""

    max_concurrent_sessions: int
    limited_by: str
    required_bytes: float  # per GPU, inside the engine's share of the memory
    shortfall_bytes: float  # per GPU, 0 where it fits
    fits: bool
    max_model_len: int  # the engine's, lowered where its pool could not hold one such request


def answer(memory: MemoryPlan, demand: Demand, *, asked_max_model_len: bool = False) -> Answer:
    """Sessions of that context on one replica, and the limit that decides."""
    config, shape = memory.config, memory.layout
    per_session = _blocks(memory, demand.context_tokens)
    usable = int(memory.num_blocks() * (1 - demand.headroom_fraction))
    held = max(0, usable // per_session - demand.paused_sessions)
    limited_by = "kv_cache" if held <= config.max_num_seqs else "max_num_seqs"
    most = min(held, config.max_num_seqs)
    length = _startable_length(memory, demand.context_tokens)
    starts = length == config.max_model_len or not asked_max_model_len
    if demand.context_tokens > config.max_model_len:
        most, limited_by = 0, "max_model_len"
    elif memory.pool.size_bytes <= 0:
        limited_by = "weights"
    wanted = demand.sessions + demand.paused_sessions
    blocks = ceil(wanted * per_session / (1 - demand.headroom_fraction))
    required = memory.budget.size_bytes - memory.pool.size_bytes + blocks * shape.block_bytes
    fits = demand.sessions <= most and starts
    shortfall = 0.0 if fits else max(0.0, required - memory.budget.size_bytes)
    return Answer(most, limited_by, required, shortfall, fits, length)


def _blocks(memory: MemoryPlan, context_tokens: int) -> int:
    budget = memory.config.max_num_batched_tokens
    return max(1, memory.layout.blocks_per_sequence(context_tokens, budget))


def _startable_length(memory: MemoryPlan, context_tokens: int) -> int:
    """The longest max_model_len that the pool holds once; engines refuse a longer one."""
    longest, blocks = memory.config.max_model_len, memory.num_blocks()
    if _blocks(memory, longest) <= blocks:
        return longest
    low, high = 0, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _blocks(memory, middle) <= blocks else (low, middle)
    rounded = low // 1024 * 1024
    return rounded if rounded >= min(context_tokens, low) else low


def engine_args(memory: MemoryPlan, result: Answer, given: EngineConfig) -> dict[str, str]:
    """The engine's own flags for this plan: what was asked for, and what the answer needs."""
    config, flags = memory.config, engine_data(memory.config.engine)["flags"]
    length, tensor, pipeline = result.max_model_len, config.tensor_parallel_size, config.pipeline_parallel_size
    args = {
        "tensor_parallel_size": tensor if tensor > 1 else None,
        "pipeline_parallel_size": pipeline if pipeline > 1 else None,
        # other formats need a checkpoint of their own
        "quantization": "fp8" if given.quantization == "fp8" and memory.model.quantization is None else None,
        "kv_cache_dtype": None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        "gpu_memory_utilization": f"{config.gpu_memory_utilization:g}",
        "max_model_len": length if length and (given.max_model_len or length < config.max_model_len) else None,
        "max_num_seqs": given.max_num_seqs and config.max_num_seqs,
        "max_num_batched_tokens": given.max_num_batched_tokens and config.max_num_batched_tokens,
        "enforce_eager": "" if config.enforce_eager else None,
    }
    return {flags[name]: str(value) for name, value in args.items() if value is not None and flags.get(name)}


def alternatives(
    model: ModelSpec, card: GpuSpec, config: EngineConfig, demand: Demand, limit: int = 4
) -> Iterator[str]:
    """What would hold the asked sessions, cheapest change first: dtypes, GPUs, another card."""
    found: set[str] = set()
    for kind, text, other, changed in _changes(model, card, config):
        if kind in found or len(found) == limit:
            continue
        try:
            fits = answer(plan(model, other, changed), demand).fits
        except UserError:
            continue
        if fits:
            found.add(kind)
            yield text


def _changes(model: ModelSpec, card: GpuSpec, config: EngineConfig) -> Iterator[tuple[str, str, GpuSpec, EngineConfig]]:
    """Kind of change, its text, the card and the flags; of one kind the first that fits is enough."""
    flags = engine_data(config.engine)["flags"]
    if config.kv_cache_dtype == "auto" and flags.get("kv_cache_dtype"):
        yield "kv", f"{flags['kv_cache_dtype']} fp8", card, replace(config, kv_cache_dtype="fp8")
    if (config.quantization or model.quantization or "bf16") == "bf16":
        for quantization in ("fp8", "int4-awq"):
            yield "weights", f"{quantization} weights", card, replace(config, quantization=quantization)
    used = max(config.gpu_count, config.tensor_parallel_size or 1)
    for size in tensor_parallel_sizes(model, 8):
        if size > used:
            changed = replace(config, gpu_count=size, tensor_parallel_size=size)
            yield "gpus", f"{size}x {card.key} (tensor parallel {size})", card, changed
    for other in sorted(map(gpu, gpu_keys()), key=lambda one: one.memory_bytes):
        if other.memory_bytes > 1.05 * card.memory_bytes:
            yield "card", f"{used}x {other.key}" if used > 1 else other.key, other, config


def context_by_turn(first_tokens: int, added_tokens: int, output_tokens: int, turns: int) -> list[int]:
    """Context after each turn, tokens: every turn re-sends what came before and adds to it.

    >>> context_by_turn(1000, 200, 100, 3)
    [1100, 1400, 1700]
    """
    return [first_tokens + output_tokens + turn * (added_tokens + output_tokens) for turn in range(turns)]
