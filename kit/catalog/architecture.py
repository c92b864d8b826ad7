"""From a Hugging Face config.json to the shapes that decide memory and time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kit.catalog.layers import ARCHITECTURES, attention_groups, moe_spec, state_groups, text_config, vision_spec
from kit.catalog.parameters import Parameters, count_parameters
from kit.catalog.quantization import kv_cache_dtype_of, quantization_of
from kit.catalog.shapes import AttentionGroup, Fields, MoeSpec, StateGroup, VisionSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's shapes in config.json spelling; counts are of the whole model."""

    key: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rotary_bytes: int  # cos-sin tables that engines keep beside the weights
    attention: tuple[AttentionGroup, ...]
    state: tuple[StateGroup, ...]
    moe: MoeSpec | None
    counts: Parameters
    absorbed_parameters: int  # MLA up projections that engines keep a second time, reshaped
    quantization: str | None  # of the checkpoint, or of the suffix it was asked by
    kept: dict[str, tuple[str, ...]]  # by quantisation: module names that such builds leave in 16 bits
    vision: VisionSpec | None
    source: str
    kv_cache_dtype: str = "auto"  # fp8 where the checkpoint says so

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, vision tower included."""
        return self.counts.total

    @property
    def active_parameters(self) -> int:
        """Parameters that one token of text multiplies with: no input embedding, top-k experts."""
        counts = self.counts
        experts = counts.experts
        if self.moe:
            experts = experts * self.moe.num_experts_per_tok // self.moe.num_experts
        head = counts.lm_head or counts.embedding  # a tied head multiplies with the embedding
        always = counts.total - counts.embedding - counts.lm_head - counts.experts - counts.vision
        return head + always + experts

    @property
    def is_mla(self) -> bool:
        """Whether attention caches one latent vector a token (replicated under TP)."""
        return any(group.kind == "mla" for group in self.attention)

    def kv_bytes_per_token(self, kv_dtype_bytes: float = 2, tensor_parallel_size: int = 1) -> float:
        """Bytes of KV cache one token adds on one rank while no sliding window has filled.

        >>> from kit.catalog import model
        >>> model("mistral-7b-v0.3").kv_bytes_per_token()  # 2 x 32 layers x 8 heads x 128 x 2 B
        131072.0
        """
        return float(
            sum(
                group.num_layers * group.bytes_per_token(kv_dtype_bytes, tensor_parallel_size)
                for group in self.attention
            )
        )


def parse_config(config: Mapping[str, Any], key: str, **extra: Any) -> ModelSpec:
    """The ModelSpec of a config.json; a missing field is named with the file.

    `extra` may carry what a config.json does not say: vision_parameters, kept and source.
    """
    fields = Fields(text_config(config), key)
    heads = fields.count("num_attention_heads", "n_head", default=0)
    hidden = fields.count("hidden_size", "n_embd", "d_model")
    layers = fields.count("num_hidden_layers", "n_layer", "num_layers")
    head_dim = fields.count("head_dim", default=max(1, hidden // max(heads, 1)))
    vision = extra.get("vision_parameters")
    quantization, kept = quantization_of(config, key)
    moe = moe_spec(fields, layers)
    return ModelSpec(
        key=key,
        model_type=str(fields.get("model_type", "unknown")),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.count("num_key_value_heads", "n_head_kv", default=heads),
        head_dim=head_dim,
        vocab_size=fields.count("vocab_size"),
        intermediate_size=fields.count("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        max_position_embeddings=fields.count("max_position_embeddings", "n_positions", default=4096),
        rotary_bytes=_rotary_bytes(fields, head_dim),
        attention=attention_groups(fields, layers, head_dim),
        state=state_groups(fields, layers),
        moe=moe,
        counts=count_parameters(fields, config, layers, head_dim, moe, vision),
        absorbed_parameters=_absorbed(fields, layers, heads),
        quantization=quantization,
        kept={**extra.get("kept", {}), **({quantization: kept} if quantization else {})},
        vision=vision_spec(config),
        source=str(extra.get("source", key)),
        kv_cache_dtype=kv_cache_dtype_of(config),
    )


def _rotary_bytes(fields: Fields, head_dim: int) -> int:
    """Bytes of the rotary cos-sin tables, 0 for models without rotary embedding.

    One row a position, 16 bit; linear scaling stretches the table by its factor, DeepSeek's YaRN
    keeps it in float32, and Gemma 3 has a second one for its sliding layers.
    """
    model_type = str(fields.get("model_type", ""))
    if model_type in ARCHITECTURES["no_rotary"]:
        return 0
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    partial = fields.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    width = fields.count("qk_rope_head_dim", default=int(head_dim * float(partial)))
    positions = fields.count("max_position_embeddings", "n_positions", default=4096)
    table = 2 * positions * width
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "linear":
        return int(table * float(rope.get("factor", 1))) + table * model_type.startswith("gemma3")
    return 2 * table if fields.get("kv_lora_rank") and kind == "yarn" else table


def _absorbed(fields: Fields, layers: int, heads: int) -> int:
    if not fields.get("kv_lora_rank"):
        return 0
    width = fields.count("qk_nope_head_dim") + fields.count("v_head_dim")
    return layers * fields.count("kv_lora_rank") * heads * width
