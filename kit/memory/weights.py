"""Bytes of weights on one rank, by what each format quantises and each parallelism splits."""

from dataclasses import dataclass

from kit.catalog import ModelSpec
from kit.catalog.quantization import BYTES_PER_PARAMETER
from kit.engine_config import ResolvedConfig
from kit.memory.shape import Term

VOCAB_PADDING = 64  # vLLM pads the vocabulary so that it splits over ranks


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline rank: its share of the layers, and whether it holds the ends of the model."""

    layer_fraction: float
    is_first: bool
    is_last: bool


def stages(num_layers: int, pipeline_parallel_size: int) -> list[Stage]:
    """Pipeline ranks with vLLM's split: what does not divide goes to the ranks before the last.

    >>> [round(stage.layer_fraction * 61) for stage in stages(61, 2)]
    [31, 30]
    """
    each, rest = divmod(num_layers, pipeline_parallel_size)
    counts = [each] * pipeline_parallel_size
    for i in range(rest):
        counts[-(i + 2)] += 1
    last = pipeline_parallel_size - 1
    return [Stage(count / num_layers, i == 0, i == last) for i, count in enumerate(counts)]


def weights_term(model: ModelSpec, config: ResolvedConfig, stage: Stage) -> Term:
    """Weights of one rank with their half width: builds differ in what they leave unquantised."""
    size = weights_bytes(model, config, stage)
    if config.quantization == "bf16":
        return Term(size, 0.004 * size)
    counts = model.counts
    doubtful = 0.0
    if model.state:  # hybrids: 4-bit builds often keep these at 8 bits
        eighth = 1 - BYTES_PER_PARAMETER[config.quantization]
        doubtful = eighth * (counts.attention + counts.attention_kv + counts.state)
    return Term(size, 0.01 * size + max(doubtful, 0.0) / config.tensor_parallel_size)


def weights_bytes(model: ModelSpec, config: ResolvedConfig, stage: Stage) -> float:
    """Bytes of parameters and rotary tables on one rank of that pipeline stage."""
    counts, tensor = model.counts, config.tensor_parallel_size
    matrix = _matrix_bytes(model, config.quantization)
    kv_copies = max(1.0, tensor / max(model.num_key_value_heads, 1))
    layers = matrix["attention"] * counts.attention / tensor
    layers += matrix["attention"] * counts.attention_kv * kv_copies / tensor
    layers += matrix["attention"] * counts.attention_replicated
    layers += (matrix["mlp"] * counts.mlp + matrix["state"] * counts.state) / tensor
    layers += matrix["experts"] * _padded_experts(model, config.quantization) / tensor
    layers += 2 * model.absorbed_parameters / tensor
    layers += 2 * (counts.router + counts.norms)
    ends = _ends_bytes(model, tensor, stage)
    return layers * stage.layer_fraction + ends + model.rotary_bytes


def _padded_experts(model: ModelSpec, quantization: str) -> float:
    """Routed-expert parameters as stored: mxfp4 kernels pad their width to a multiple of 256."""
    if quantization != "mxfp4" or model.moe is None:
        return model.counts.experts
    width = model.moe.moe_intermediate_size
    return model.counts.experts * (-(-width // 256) * 256) / width


def _matrix_bytes(model: ModelSpec, quantization: str) -> dict[str, float]:
    """Bytes per parameter by component; mxfp4 checkpoints quantise their experts alone."""
    size = BYTES_PER_PARAMETER[quantization]
    sizes = dict.fromkeys(("attention", "mlp", "state", "experts"), size)
    if quantization == "mxfp4" and model.counts.experts:
        sizes.update(attention=2.0, mlp=2.0, state=2.0)
    kept = " ".join(model.kept.get(quantization, ()))
    if "self_attn" in kept or "attn" in kept.split():
        sizes["attention"] = 2.0
    if "linear_attn" in kept or "mamba" in kept or "mixer" in kept:
        sizes["state"] = 2.0
    return sizes


def _ends_bytes(model: ModelSpec, tensor: int, stage: Stage) -> float:
    """Embedding, output head and vision tower: 16 bit, split over the ranks of the stage."""
    counts = model.counts
    padded = -(-model.vocab_size // VOCAB_PADDING) * VOCAB_PADDING / model.vocab_size
    total = 0.0
    if stage.is_first:
        total += 2 * (counts.embedding * padded + counts.vision)
    if stage.is_last:
        total += 2 * counts.lm_head * padded
        if not counts.lm_head and not stage.is_first:  # a tied head needs its own copy
            total += 2 * counts.embedding * padded
    return total / tensor
