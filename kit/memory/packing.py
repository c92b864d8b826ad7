"""Several engines on one GPU: an explicit share of memory for each, or why it cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig
from kit.memory.plan import plan
from kit.memory.sessions import Demand, answer

# CUDA context and allocator slack of each further process, outside every engine's own share.
PROCESS_BYTES = 600 * 2**20


@dataclass(frozen=True, slots=True)
class Share:
    """One engine's part of the GPU."""

    model: ModelSpec
    required_bytes: float
    gpu_memory_utilization: float
    sessions: int  # what this share then holds


@dataclass(frozen=True, slots=True)
class Packing:
    """All engines on one GPU; leftover_bytes is negative where they do not fit together."""

    shares: tuple[Share, ...]
    leftover_bytes: float

    @property
    def fits(self) -> bool:
        """Whether every engine can start beside the others."""
        return self.leftover_bytes >= 0


def pack(gpu: GpuSpec, engines: Sequence[tuple[ModelSpec, EngineConfig, Demand]]) -> Packing:
    """The smallest share that holds each engine's sessions, side by side on one GPU.

    A second engine at the default share cannot start: the first has taken 90 % or more of the card.
    """
    shares = []
    for model, config, demand in engines:
        length = config.max_model_len or min(demand.context_tokens, model.max_position_embeddings)
        bounded = replace(config, max_model_len=length, gpu_memory_utilization=1.0)
        required = answer(plan(model, gpu, bounded), demand).required_bytes
        fraction = ceil(1000 * (required + 2**20) / gpu.memory_bytes) / 1000
        held = 0
        if fraction <= 1:
            own = plan(model, gpu, replace(bounded, gpu_memory_utilization=fraction))
            held = answer(own, demand).max_concurrent_sessions
        shares.append(Share(model, required, fraction, held))
    used = sum(share.gpu_memory_utilization for share in shares) * gpu.memory_bytes
    return Packing(tuple(shares), gpu.memory_bytes - used - len(shares) * PROCESS_BYTES)
