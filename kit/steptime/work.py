"""What one step of a replica reads, multiplies and sends, in seconds at the datasheet's peak rates."""

from dataclasses import dataclass, replace
from math import log2
from typing import Any

from kit.catalog import AttentionGroup, GpuSpec, ModelSpec
from kit.engine_config import ResolvedConfig
from kit.memory.weights import Stage, weights_bytes

ROPE_DIM = 64  # rotary part of an MLA head; every published MLA model has 64
SPARSE_TOKENS = 2048  # keys that a sparse attention's indexer selects for each query
GEMM_DTYPES = {"fp8": "fp8", "int8": "int8", "nvfp4": "fp4"}  # the others multiply in 16 bits
WHOLE = Stage(1.0, True, True)
# Their caches may have had 8 bits where they were measured: bytes count as 16-bit, a coefficient takes the difference.
EIGHT_BIT_CACHE = ("fp8", "nvfp4")
Number = Any  # float, or an array of floats in the fit


@dataclass(frozen=True, slots=True)
class Work:
    """Peak-rate seconds of one replica: its ranks work at once, pipeline stages one after the other."""

    dense_read_s: Number  # weights that every step reads, on one rank
    expert_read_s: Number  # all routed experts of one rank
    expert_skip: Number  # probability that one token leaves one expert alone
    bf16_s: Number  # dense matrix products of one token, under the dtype that they run in
    fp8_s: Number
    fp4_s: Number
    expert_s: Number  # routed experts' products of one token
    kv_read_s: Number  # one token of context, counted at 16 bits
    row_read_s: Number  # one decode row's filled windows and state
    eight_bit: Number  # 1 where weights or cache are quantised, 0 elsewhere
    pair_s: Number  # one query looking at one key, in all layers that see everything
    window_pair_s: Number  # one query looking at full windows
    layers: Number
    moe_layers: Number
    index_layers: Number  # sparse attention: layers that score and select their keys first
    state_layers: Number  # linear attention and state-space layers
    reduces: Number  # all-reduces of a step, 0 on one GPU
    reduce_hops: Number  # the same, times log2 of the ranks
    link_s: Number  # all-reduces of one token at the link's bandwidth


def work(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig) -> Work:
    """The work of one replica of the model on GPUs of that kind."""
    ranks, bandwidth = config.tensor_parallel_size, gpu.memory_bandwidth_bytes_per_s
    dense_bytes, expert_bytes = _bytes(model, config)
    experts = model.moe
    share = experts.num_experts_per_tok / experts.num_experts if experts else 0.0
    used = model.counts.experts * share
    gemm, expert_gemm = _dtypes(model, gpu, config)
    dense_s = 2 * (model.active_parameters - used) / ranks / gpu.flops_per_s(gemm)
    row, kv, pair, window, latent = _attention(model, ranks)
    bf16 = gpu.flops_per_s("bf16") * ranks
    sent_bytes = 2 * 2 * (ranks - 1) / ranks * model.hidden_size  # of one token in a ring all-reduce
    reduces = 2.0 * model.num_hidden_layers if ranks > 1 else 0.0
    return Work(
        dense_read_s=dense_bytes / bandwidth,
        expert_read_s=expert_bytes / bandwidth,
        expert_skip=1.0 - share,
        bf16_s=dense_s if gemm == "bf16" else 0.0,
        fp8_s=dense_s if gemm in ("fp8", "int8") else 0.0,
        fp4_s=dense_s if gemm == "fp4" else 0.0,
        expert_s=2 * used / ranks / gpu.flops_per_s(expert_gemm),
        kv_read_s=kv / bandwidth + latent / bf16,
        row_read_s=row / bandwidth,
        eight_bit=float(config.quantization in EIGHT_BIT_CACHE or config.kv_cache_dtype == "fp8"),
        pair_s=pair / bf16,
        window_pair_s=window / bf16,
        layers=float(model.num_hidden_layers),
        moe_layers=float(experts.num_moe_layers if experts else 0),
        index_layers=float(sum(g.num_layers for g in model.attention if g.indexer_bytes)),
        state_layers=float(sum(g.num_layers for g in model.state)),
        reduces=reduces,
        reduce_hops=reduces * log2(ranks),
        link_s=reduces * sent_bytes / gpu.link_bytes_per_s,
    )


def _bytes(model: ModelSpec, config: ResolvedConfig) -> tuple[float, float]:
    """Weights on one rank that a step reads: always, and in routed experts."""
    counts, ranks = model.counts, config.tensor_parallel_size
    bare = replace(model, counts=replace(counts, experts=0))
    experts = weights_bytes(model, config, WHOLE) - weights_bytes(bare, config, WHOLE)
    if model.moe and config.quantization == "nvfp4":  # such builds quantise the experts alone
        config = replace(config, quantization="bf16")
    unread = 2 * counts.vision + 2 * model.absorbed_parameters
    unread += 2 * counts.embedding if counts.lm_head else 0
    dense = weights_bytes(bare, config, WHOLE) - unread / ranks - model.rotary_bytes
    return dense, experts


def _dtypes(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig) -> tuple[str, str]:
    """GEMM dtypes of dense layers and of experts, by what this GPU multiplies natively."""
    rates, name = gpu.dense_flops_per_s, config.quantization
    native = GEMM_DTYPES[name] if rates.get(GEMM_DTYPES.get(name, "")) else "bf16"
    if name == "mxfp4":  # 8-bit activations where the card has 4-bit units, 16-bit ones elsewhere
        return "bf16", "fp8" if rates.get("fp4") else "bf16"
    return ("bf16" if model.moe and name == "nvfp4" else native), native


def _attention(model: ModelSpec, ranks: int) -> tuple[float, float, float, float, float]:
    """Bytes of a row and of a token of context, on one rank with a 16-bit cache; FLOPs of a query-key pair, of a
    token in layers that see a window or selected keys, and of a token of context under MLA's absorbed heads.
    """
    row = sum(2 * g.num_layers * g.bytes_per_sequence(ranks) for g in model.state)
    kv = pair = window = latent = 0.0
    for group in model.attention:
        per_dim = 2.0 * group.num_layers * model.num_attention_heads
        one, index = (group.num_layers * x for x in (group.bytes_per_token(2, ranks), group.indexer_bytes))
        flops = per_dim * _head_dims(model, group)
        if keys := group.window or (SPARSE_TOKENS if index else 0):
            row, window, kv = row + (one - index) * keys, window + flops * keys, kv + index
            continue
        kv, pair = kv + one, pair + flops / group.compress_ratio
        if group.kind == "mla":
            latent += per_dim * (2 * group.latent_dim - ROPE_DIM)
    return row, kv, pair, window, latent


def _head_dims(model: ModelSpec, group: AttentionGroup) -> int:
    """Query-key and value widths of one head, summed."""
    if group.kind != "mla":
        return 2 * group.head_dim
    rank = group.latent_dim - ROPE_DIM
    return model.absorbed_parameters // max(1, group.num_layers * rank * model.num_attention_heads) + ROPE_DIM
