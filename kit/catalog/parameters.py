"""Parameter counts by component: quantisation and tensor parallelism treat each differently."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

from kit.catalog.layers import ARCHITECTURES, layer_kinds, linear_dims, mamba_dims
from kit.catalog.shapes import Fields, MoeSpec


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of the whole model by component."""

    embedding: int
    lm_head: int  # 0 where it is tied to the embedding
    attention: int  # query and output projections, split over TP ranks
    attention_kv: int  # key and value projections, duplicated where TP exceeds the KV heads
    attention_replicated: int  # MLA down projections and indexers, on every rank
    mlp: int  # dense feed-forward layers and shared experts
    experts: int
    router: int
    state: int  # projections of state-space and linear-attention layers
    norms: int  # and biases: always 16 bit
    vision: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, field.name) for field in dataclass_fields(self))


def count_parameters(
    fields: Fields,
    config: Mapping[str, Any],
    num_layers: int,
    head_dim: int,
    moe: MoeSpec | None,
    vision_parameters: int | None,
) -> Parameters:
    """Parameters by component from a config.json (within 0.5 % of published counts)."""
    hidden = fields.count("hidden_size", "n_embd", "d_model")
    vocab = fields.count("vocab_size")
    kinds = Counter(_kinds(fields, num_layers))
    attention, kv, replicated, small = _attention(fields, hidden, head_dim, kinds)
    dense, shared, experts, router = _feed_forward(fields, hidden, num_layers, moe)
    embedding = vocab * fields.count("word_embed_proj_dim", default=hidden)
    if fields.get("model_type") in ("opt", "gpt2"):  # learned positions
        embedding += (fields.count("max_position_embeddings", "n_positions", default=2048) + 2) * hidden
    tied = fields.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return Parameters(
        embedding=embedding,
        lm_head=0 if tied else vocab * hidden,
        attention=attention,
        attention_kv=kv,
        attention_replicated=replicated,
        mlp=dense + shared,
        experts=experts,
        router=router,
        state=_state(fields, hidden, kinds),
        norms=small + (_norms_per_layer(fields) * num_layers + 1) * hidden,
        vision=_vision(config) if vision_parameters is None else int(vision_parameters),
    )


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    if fields.get("compress_ratios"):
        return ["compressed"] * num_layers
    return layer_kinds(fields, num_layers)


def _norms_per_layer(fields: Fields) -> int:
    return 4 if fields.get("model_type", "").startswith(("gemma2", "gemma3", "gemma4")) else 2


def _attention(fields: Fields, hidden: int, head_dim: int, kinds: Counter[str]) -> tuple[int, int, int, int]:
    """Sharded, key-value, replicated and small (bias, norm) parameters of all attention layers."""
    heads = fields.count("num_attention_heads", "n_head", default=1)
    layers = kinds["full"] + kinds["sliding"] + kinds["chunked"] + kinds["compressed"]
    if fields.get("kv_lora_rank"):
        sharded, replicated = _mla(fields, hidden, heads)
        return layers * sharded, 0, layers * replicated, 0
    if kinds["compressed"]:
        return (layers * _compressed(fields, hidden, heads, head_dim), 0, layers * hidden * head_dim, 0)
    kv_heads = fields.count("num_key_value_heads", "n_head_kv", default=heads)
    gate = 2 if fields.get("attn_output_gate") else 1  # Qwen3-Next gates the output by a twin of q
    sharded = kv = small = 0
    for kind in ("full", "sliding", "chunked"):
        wide, kv_wide = head_dim, kv_heads
        if kind == "full":
            wide = fields.count("global_head_dim", default=head_dim)
            kv_wide = fields.count("num_global_key_value_heads", default=kv_heads)
        kv_copies = 1 if kind == "full" and fields.get("attention_k_eq_v") else 2
        sharded += kinds[kind] * (gate + 1) * hidden * heads * wide
        kv += kinds[kind] * kv_copies * hidden * kv_wide * wide
        small += kinds[kind] * _bias_and_norm(fields, hidden, heads, kv_wide, wide)
    return sharded, kv, 0, small


def _bias_and_norm(fields: Fields, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    model_type = fields.get("model_type", "")
    count = 0
    if fields.get("attention_bias", model_type in ARCHITECTURES["attention_bias"]):
        count += (heads + 2 * kv_heads) * head_dim
        count += hidden if model_type in ARCHITECTURES["output_bias"] else 0
    if model_type in ARCHITECTURES["qk_norm"]:
        count += 2 * head_dim
    return count


def _mla(fields: Fields, hidden: int, heads: int) -> tuple[int, int]:
    nope, rope = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    value, latent = fields.count("v_head_dim"), fields.count("kv_lora_rank")
    q_rank = fields.count("q_lora_rank", default=0)
    sharded = (q_rank or hidden) * heads * (nope + rope)
    sharded += latent * heads * (nope + value) + heads * value * hidden
    replicated = hidden * (latent + rope) + hidden * q_rank
    if index := fields.count("index_head_dim", default=0):
        index_heads = fields.count("index_n_heads", default=64)
        replicated += q_rank * index_heads * index + hidden * (index + index_heads)
    return sharded, replicated


def _compressed(fields: Fields, hidden: int, heads: int, head_dim: int) -> int:
    """DeepSeek-V4: low-rank queries, grouped low-rank output."""
    q_rank = fields.count("q_lora_rank", default=hidden)
    o_rank = fields.count("o_lora_rank", default=1024) * fields.count("o_groups", default=8)
    return (
        q_rank * (hidden + heads * head_dim)
        + o_rank * hidden
        + heads * head_dim * (fields.count("o_lora_rank", default=1024))
    )


def _feed_forward(fields: Fields, hidden: int, num_layers: int, moe: MoeSpec | None) -> tuple[int, int, int, int]:
    """Dense, shared-expert, routed-expert and router parameters."""
    model_type = fields.get("model_type", "")
    matrices = 2 if model_type in ARCHITECTURES["ungated_mlp"] else 3
    width = fields.count("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    if model_type.startswith("llama4"):
        width = fields.count("intermediate_size_mlp", default=width)
    mlp_layers = num_layers
    if pattern := fields.get("hybrid_override_pattern"):
        mlp_layers = pattern.count("-")
    if moe is None:
        return mlp_layers * matrices * hidden * width, 0, 0, 0
    one = matrices * hidden
    dense = max(0, mlp_layers - moe.num_moe_layers) * one * width
    shared = moe.num_moe_layers * one * moe.shared_intermediate_size
    experts = moe.num_moe_layers * moe.num_experts * one * moe.moe_intermediate_size
    if model_type == "gpt_oss":  # its experts carry biases
        per_expert = 2 * moe.moe_intermediate_size + hidden
        experts += moe.num_moe_layers * moe.num_experts * per_expert
    return dense, shared, experts, moe.num_moe_layers * hidden * moe.num_experts


def _state(fields: Fields, hidden: int, kinds: Counter[str]) -> int:
    count = 0
    if kinds["linear"]:
        key, value = linear_dims(fields)
        kernel = fields.count("linear_conv_kernel_dim", default=4)
        value_heads = fields.count("linear_num_value_heads")
        projections = hidden * (2 * key + 2 * value + 2 * value_heads) + value * hidden
        count += kinds["linear"] * (projections + (2 * key + value) * kernel)
    if kinds["mamba"]:
        inner, state, n_groups = mamba_dims(fields)
        heads = fields.count("mamba_num_heads", "mamba_n_heads", default=max(1, inner // 64))
        projections = hidden * (2 * inner + 2 * n_groups * state + heads) + inner * hidden
        count += kinds["mamba"] * (projections + (inner + 2 * n_groups * state) * 4)
    return count


def _vision(config: Mapping[str, Any]) -> int:
    """A plain vision transformer from vision_config, 0 without one (no projector: below 1 %)."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        return 0
    fields = Fields(tower, "vision_config")
    hidden = fields.count("hidden_size", "width", default=0)
    depth = fields.count("num_hidden_layers", "depth", "layers", default=0)
    width = fields.count("intermediate_size", default=4 * hidden)
    return int(depth * (4 * hidden * hidden + 2 * hidden * width))
