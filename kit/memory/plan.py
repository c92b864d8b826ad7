"""One replica's memory plan: the engine's start-up log, predicted line by line with intervals."""

from dataclasses import dataclass
from math import sqrt

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, ResolvedConfig, by_version, engine_data, resolve
from kit.memory import fraction, vllm
from kit.memory.pool import Layout, layout
from kit.memory.shape import Term
from kit.memory.weights import Stage, stages, weights_term


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the start-up log will say, per GPU of the poorest rank, and what the pool holds."""

    model: ModelSpec
    gpu: GpuSpec
    config: ResolvedConfig
    budget: Term  # utilisation x memory
    weights: Term
    activation: Term
    non_torch: Term
    cuda_graph: Term
    graphs_charged: bool
    pool: Term  # may be negative: the shortfall
    layout: Layout
    kv_bytes_per_token: float  # one replica, all its GPUs
    printed_by_concurrency: bool

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes of KV pool per GPU, never negative."""
        return max(0.0, self.pool.size_bytes)

    @property
    def kv_cache_bytes_interval(self) -> tuple[float, float]:
        """90 % interval of the pool per GPU, bytes."""
        low = self.pool.size_bytes - self.pool.half_width_bytes
        return max(0.0, low), max(0.0, self.pool.size_bytes + self.pool.half_width_bytes)

    def num_blocks(self, pool_bytes: float | None = None) -> int:
        """Blocks in a pool of that many bytes per GPU."""
        size = self.kv_cache_bytes if pool_bytes is None else pool_bytes
        return int(size // self.layout.block_bytes)

    def kv_cache_tokens(self, pool_bytes: float | None = None) -> int:
        """Tokens as this engine version prints them for a pool of that many bytes per GPU."""
        blocks, shape = self.num_blocks(pool_bytes), self.layout
        if self.printed_by_concurrency and shape.num_groups > 1:
            length = self.config.max_model_len
            return int(self.concurrency(length, pool_bytes) * length)
        return blocks // max(shape.num_groups, 1) * shape.block_size

    def concurrency(self, context_tokens: int, pool_bytes: float | None = None) -> float:
        """Sequences of that many tokens that the pool holds at once."""
        budget = self.config.max_num_batched_tokens
        return self.num_blocks(pool_bytes) / self.layout.blocks_per_sequence(context_tokens, budget)


def plan(model: ModelSpec, gpu: GpuSpec, config: EngineConfig) -> MemoryPlan:
    """The memory plan of one replica; the poorest pipeline rank decides."""
    resolved = config if isinstance(config, ResolvedConfig) else resolve(config, model, gpu)
    ranks = stages(model.num_hidden_layers, resolved.pipeline_parallel_size)
    plans = [_rank_plan(model, gpu, resolved, stage) for stage in ranks]
    return min(plans, key=lambda p: p.pool.size_bytes / p.layout.block_bytes)


def _rank_plan(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig, stage: Stage) -> MemoryPlan:
    profiled = vllm.rule_of(model, config)  # shapes of a forward pass, whichever engine runs it
    rule = profiled if config.engine == "vllm" else engine_data(config.engine)["memory"]
    weights = weights_term(model, config, stage)
    activation = vllm.activation(model, gpu, config, stage, profiled)
    graphs = vllm.cuda_graphs(model, config, profiled)
    if config.engine == "vllm":
        non_torch = vllm.non_torch(gpu, config, rule)
        charged = vllm.graphs_charged(config, rule)
        budget = vllm.budget(gpu, config)
        state_blocks = by_version(rule["state_blocks_per_sequence"], config.engine_version)
        shape = layout(model, config, stage.layer_fraction, state_blocks)
        printed = by_version(rule["printed_tokens"], config.engine_version)
    else:
        non_torch, charged, printed = Term(0.0, 0.0), False, "blocks"
        if not rule["activation_charged"]:
            activation = Term(0.0, 0.0)
        budget = fraction.budget(gpu, config, weights, activation, rule)
        shape = fraction.layout(model, config, stage.layer_fraction, rule)
    parts = [weights, activation, non_torch] + ([graphs] if charged else [])
    pool = Term(
        budget.size_bytes - sum(part.size_bytes for part in parts),
        sqrt(sum(part.half_width_bytes**2 for part in [budget, *parts])),
    )
    tensor = config.tensor_parallel_size
    per_token = model.kv_bytes_per_token(config.kv_dtype_bytes, tensor) * tensor
    return MemoryPlan(
        model, gpu, config, budget, weights, activation, non_torch, graphs, charged, pool, shape,
        per_token, printed == "concurrency",
    )  # fmt: skip
