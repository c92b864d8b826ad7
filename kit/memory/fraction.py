"""Engines that take a fraction instead of profiling: SGLang, TensorRT-LLM, TGI, Ollama.

SGLang's rule is checked against published logs; the others follow their documentation, with wide
intervals.
"""

from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import ResolvedConfig
from kit.memory.pool import Layout
from kit.memory.shape import Term


def budget(gpu: GpuSpec, config: ResolvedConfig, weights: Term, rest: Term, rule: dict[str, Any]) -> Term:
    """Bytes that weights, activations and pool share, as the engine reads its fraction."""
    total, fraction = gpu.memory_bytes, config.gpu_memory_utilization
    context = rule["context_bytes"]
    size = {
        "of_free_at_start": fraction * (total - context),
        # the fraction is taken of what the weights and activations leave
        "of_free_after_load": fraction * (total - context) + (1 - fraction) * (weights.size_bytes + rest.size_bytes),
        "of_total": fraction * total - context,
    }[rule["pool"]]
    half_width = rule["context_half_width_bytes"] + rule["relative_half_width"] * size
    return Term(size, half_width + gpu.memory_relative_uncertainty * total)


def layout(model: ModelSpec, config: ResolvedConfig, layers: float, rule: dict[str, Any]) -> Layout:
    """Blocks of the pool: all layers together, sliding ones at their own share of tokens."""
    tensor, kv_bytes = config.tensor_parallel_size, config.kv_dtype_bytes
    share = rule.get("sliding_token_share", 1.0)
    cell = sum(
        group.num_layers * group.bytes_per_token(kv_bytes, tensor) * (share if group.window is not None else 1.0)
        for group in model.attention
    )
    if model.state:  # a fixed share of the pool is set aside for states
        cell /= 1 - rule.get("state_share", 0.0)
    return Layout(config.block_size, max(cell * layers, 1.0) * config.block_size, 1, (), 0, 1)
