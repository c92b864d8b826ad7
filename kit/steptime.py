"""Seconds of one engine step from the datasheet: a roofline that nothing has calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import ResolvedConfig

WARNING = "step time is an uncalibrated datasheet roofline (guess)"
COMPUTE_EFFICIENCY = 0.55  # of dense peak FLOP/s in large matrix products: an assumption
BANDWIDTH_EFFICIENCY = 0.75  # of peak memory bandwidth: an assumption
STEP_OVERHEAD_S = 0.002  # scheduling, sampling and launches of one step: an assumption
ALL_REDUCE_LATENCY_S = 10e-6  # start of one all-reduce among GPUs of a node: an assumption
GEMM_DTYPES = {"fp8": "fp8", "int8": "int8", "nvfp4": "fp4"}  # the others multiply in 16 bits


@dataclass(frozen=True, slots=True)
class Roofline:
    """One replica: weight reads or matrix products, the longer, plus attention and links."""

    weights_bytes: float
    expert_fraction: float  # of the weights, in routed experts
    expert_share: float  # of the experts that one token uses
    flops_per_token: float
    attention_flops_per_pair: float  # one query token looking at one key token, all layers
    kv_bytes_per_token: float
    flops_per_s: float
    attention_flops_per_s: float
    bandwidth_bytes_per_s: float
    link_s_per_token: float
    link_s: float

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill chunks (tokens, tokens before) and decode rows.

        `context` is the KV tokens that all decode rows read together.
        """
        tokens = decodes
        pairs = context_read = 0.0
        for new, before in chunks:
            tokens += new
            pairs += new * (before + (new + 1) / 2)
            context_read += before
        base_s, per_context_s = self.decode_line(tokens)
        attention_s = pairs * self.attention_flops_per_pair / self.attention_flops_per_s
        return base_s + attention_s + (context + context_read) * per_context_s

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        touched = 1 - self.expert_fraction * (1 - self.expert_share) ** decodes
        read_s = self.weights_bytes * touched / self.bandwidth_bytes_per_s
        multiply_s = decodes * self.flops_per_token / self.flops_per_s
        links_s = self.link_s + decodes * self.link_s_per_token
        per_context_s = self.kv_bytes_per_token / self.bandwidth_bytes_per_s
        return STEP_OVERHEAD_S + max(read_s, multiply_s) + links_s, per_context_s


def roofline(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig, weights_bytes: float) -> Roofline:
    """The roofline of one replica whose weights take `weights_bytes` on all its GPUs together.

    Tensor-parallel ranks work at once, pipeline stages one after the other.
    """
    ranks, layers = config.tensor_parallel_size, model.num_hidden_layers
    all_reduces = 2 * layers if ranks > 1 else 0
    sent_bytes = 2 * (ranks - 1) / ranks * 2 * model.hidden_size
    experts = model.moe
    return Roofline(
        weights_bytes=weights_bytes,
        expert_fraction=model.counts.experts / model.counts.total if experts else 0.0,
        expert_share=experts.num_experts_per_tok / experts.num_experts if experts else 1.0,
        flops_per_token=2.0 * model.active_parameters,
        attention_flops_per_pair=4.0 * layers * model.num_attention_heads * model.head_dim,
        kv_bytes_per_token=ranks * model.kv_bytes_per_token(config.kv_dtype_bytes, ranks),
        flops_per_s=ranks * COMPUTE_EFFICIENCY
        * gpu.flops_per_s(GEMM_DTYPES.get(config.quantization, "bf16")),
        attention_flops_per_s=ranks * COMPUTE_EFFICIENCY * gpu.flops_per_s("bf16"),
        bandwidth_bytes_per_s=ranks * BANDWIDTH_EFFICIENCY * gpu.memory_bandwidth_bytes_per_s,
        link_s_per_token=all_reduces * sent_bytes / gpu.link_bytes_per_s,
        link_s=all_reduces * ALL_REDUCE_LATENCY_S,
    )  # fmt: skip
