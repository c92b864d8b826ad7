"""vLLM V1's start-up memory rule, term by term, with a 90 % half width beside each.

The engine runs one dummy batch of max_num_batched_tokens and one dummy sampler call of max_num_seqs
rows, takes what was allocated at the peak, and gives the rest of utilisation x memory to the pool.
The terms below are the tensors of that run; data/engines/vllm.yaml holds the constants by version.
"""

from math import ceil
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import ResolvedConfig, by_version, engine_data, version_tuple
from kit.memory.shape import Term
from kit.memory.weights import Stage
from kit.units import GIB, MIB


def rule_of(model: ModelSpec, config: ResolvedConfig) -> dict[str, Any]:
    """The constants of that version's model runner: the first one, or the second where it is the default."""
    rule: dict[str, Any] = engine_data("vllm")["memory"]
    second, version = rule["model_runner_v2"], version_tuple(config.engine_version)
    dense = model.moe is None and not model.state
    begins = version_tuple(second["dense_from" if dense else "all_from"])
    return {**rule, **second} if config.engine == "vllm" and version >= begins else rule


def budget(gpu: GpuSpec, config: ResolvedConfig) -> Term:
    """Utilisation x memory; drivers and other processes move it by a few tenths of a percent."""
    size = ceil(gpu.memory_bytes * config.gpu_memory_utilization)
    return Term(size, size * (0.002 + gpu.memory_relative_uncertainty))


def activation(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig, stage: Stage, rule: dict[str, Any]) -> Term:
    """Bytes allocated by the profiling run above the weights, on one rank."""
    forward = _forward_bytes(model, config, rule)
    moe = _moe_bytes(model, config)
    workspace = rule["gemm_workspace_bytes"].get(gpu.architecture)
    workspace = workspace or rule["gemm_workspace_bytes"]["other"]
    vision, tower = _vision_bytes(model, config)
    if not stage.is_last:
        total = max(forward + moe + vision, tower) + workspace
        return Term(total, 0.1 * total)
    sampler = _sampler_bytes(model, gpu, config, rule)
    if by_version(rule["moe_workspace_kept"], config.engine_version):
        text = moe + max(sampler, forward)
    else:
        text = max(sampler, forward + moe)
    total = max(text + vision, tower) + workspace
    surest = 0.015 if text - moe == sampler and tower <= text + vision else 0.15
    return Term(total, surest * total + 0.3 * vision + 8 * MIB)


def _sampler_bytes(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig, rule: dict[str, Any]) -> float:
    """The dummy sampler: logits of max_num_seqs rows and their copies, hidden states kept below."""
    rows, version = config.max_num_seqs, config.engine_version
    size = by_version(rule["sampler_bytes_per_logit"], version) * rows * model.vocab_size
    if by_version(rule["sampler_row_buffer"], version):
        size += 4 * min(gpu.multiprocessors, rows) * model.vocab_size
    return float(size + 2 * (config.max_num_batched_tokens + rows) * model.hidden_size)


def _forward_bytes(model: ModelSpec, config: ResolvedConfig, rule: dict[str, Any]) -> float:
    """The widest moment of one layer: gate, up and their product beside the hidden states."""
    width = model.intermediate_size
    if model.moe and model.moe.num_moe_layers == model.num_hidden_layers:
        width = model.moe.shared_intermediate_size  # every dense path is a shared expert
    width_bytes = 2 * 3 * width
    if config.quantization == "int8":
        width_bytes += width  # the activation quantised for the down projection
    hidden_bytes = 2 * rule["forward_hidden_copies"] * model.hidden_size
    return float(config.max_num_batched_tokens * (width_bytes / config.tensor_parallel_size + hidden_bytes))


def _moe_bytes(model: ModelSpec, config: ResolvedConfig) -> float:
    """The fused-MoE kernel's two workspaces over token x top-k rows; mxfp4 kernels need none."""
    if model.moe is None or config.quantization == "mxfp4":
        return 0.0
    rows = config.max_num_batched_tokens * model.moe.num_experts_per_tok
    width = model.moe.moe_intermediate_size / config.tensor_parallel_size
    hidden = model.hidden_size
    return 2 * rows * (max(width, hidden) + max(2 * width, hidden))


def _vision_bytes(model: ModelSpec, config: ResolvedConfig) -> tuple[float, float]:
    """Image embeddings and pixels kept in the profiling run, and the tower's own peak."""
    tower = model.vision
    if tower is None:
        return 0.0, 0.0
    tokens = max(config.max_num_batched_tokens, tower.max_tokens_per_item)
    kept = tokens * 2 * (model.hidden_size + 3 * tower.pixels_per_token)
    patches = tokens * tower.patches_per_token
    # not divided by TP: start-ups with two ranks show the whole tower's peak on each
    peak = 2 * patches * (2 * tower.intermediate_size + 4 * tower.hidden_size)
    return float(kept), float(kept + peak)


def non_torch(gpu: GpuSpec, config: ResolvedConfig, rule: dict[str, Any]) -> Term:
    """Bytes outside PyTorch's allocator: CUDA modules, and communication buffers under TP."""
    version = config.engine_version
    architecture = "hopper" if gpu.architecture in ("hopper", "blackwell") else "other"
    size = float(by_version(rule["non_torch_bytes"][architecture], version))
    half_width = 0.04 * GIB
    ranks = config.tensor_parallel_size
    if ranks > 1:
        link = "nvlink" if gpu.link.startswith("nvlink") else "pcie"
        channels = rule["communication_bytes"][link]
        size += channels["two_ranks"] + (ranks - 2) * channels["each_further"]
        if link == "nvlink" and not config.enforce_eager:
            size += by_version(rule["fused_all_reduce_bytes"], version)
        half_width = 0.15 * GIB if link == "nvlink" else 0.25 * GIB
    elif config.pipeline_parallel_size > 1:
        size, half_width = size / 2, 0.1 * GIB
    return Term(size, half_width)


def cuda_graphs(model: ModelSpec, config: ResolvedConfig, rule: dict[str, Any]) -> Term:
    """Bytes of captured graphs over all batch sizes, as the engine estimates them."""
    if config.enforce_eager:
        return Term(0.0, 0.0)
    sizes = capture_sizes(config.max_num_seqs)
    kernels = rule["graph_moe_factor"] if model.moe else 1.0
    per_size = rule["graph_bytes_per_layer_and_size"] * model.num_hidden_layers * kernels
    total = rule["graph_bytes_fixed"] + sizes * per_size
    return Term(total, 0.35 * total)


def graphs_charged(config: ResolvedConfig, rule: dict[str, Any]) -> bool:
    """Whether this version subtracts the graph estimate from the pool."""
    return bool(by_version(rule["graphs_charged"], config.engine_version))


def capture_sizes(max_num_seqs: int) -> int:
    """How many batch sizes are captured: 1, 2, 4, then steps of 8 to 256 and of 16 to 512.

    >>> capture_sizes(256), capture_sizes(8)
    (51, 5)
    """
    limit = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    return sum(size <= limit for size in sizes)
