"""Which kinds of layers a config.json describes: attention groups, state layers, experts."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.catalog.shapes import AttentionGroup, Fields, MoeSpec, StateGroup, VisionSpec
from kit.errors import UserError

ARCHITECTURES: dict[str, Any] = load_yaml(DATA / "architectures.yaml")
_TEXT_KEYS = ("text_config", "language_config", "llm_config")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json, also of a multimodal one."""
    inner = config.get("thinker_config") or config
    for key in _TEXT_KEYS:
        nested = inner.get(key)
        if isinstance(nested, Mapping):
            config = {**config, **nested}
            break
    return {**ARCHITECTURES["class_defaults"].get(str(config.get("model_type")), {}), **config}


def layer_kinds(fields: Fields, num_layers: int) -> list[str]:
    """Per layer: full, sliding, chunked, linear, mamba or none (a layer without a cache)."""
    window = fields.get("sliding_window")
    types = fields.get("layer_types") or fields.get("layers_block_type")
    if types:
        return _checked([ARCHITECTURES["layer_types"].get(str(name), "full") for name in types], fields, num_layers)
    if pattern := fields.get("hybrid_override_pattern"):
        return _checked([ARCHITECTURES["hybrid_letters"].get(c, "none") for c in pattern], fields, num_layers)
    if interval := fields.get("full_attention_interval"):
        return _every(int(interval), "linear", num_layers)
    if fields.get("model_type", "").startswith("llama4"):
        return _every(4, "chunked", num_layers)
    if not window or fields.get("use_sliding_window") is False:
        return ["full"] * num_layers
    if period := fields.get("sliding_window_pattern"):
        return _every(int(period), "sliding", num_layers)
    if fields.get("model_type") in ("gemma2", "gpt_oss"):
        return _every(2, "sliding", num_layers)
    first = fields.count("max_window_layers", default=0) if fields.get("use_sliding_window") else 0
    return ["full"] * min(first, num_layers) + ["sliding"] * max(0, num_layers - first)


def _every(period: int, other: str, num_layers: int) -> list[str]:
    """One full-attention layer at the end of each period, the other kind between."""
    return ["full" if (i + 1) % max(period, 1) == 0 else other for i in range(num_layers)]


def _checked(kinds: list[str], fields: Fields, num_layers: int) -> list[str]:
    if len(kinds) != num_layers:
        raise UserError(f"{fields.where}: {len(kinds)} layer types for num_hidden_layers {num_layers}")
    return kinds


def attention_groups(fields: Fields, num_layers: int, head_dim: int) -> tuple[AttentionGroup, ...]:
    """The layers that cache, grouped by what one of them caches."""
    if ratios := fields.get("compress_ratios"):
        return _compressed_groups(fields, ratios, num_layers, head_dim)
    counts = Counter(layer_kinds(fields, num_layers))
    return tuple(
        _group(fields, kind, counts[kind], head_dim) for kind in ("full", "sliding", "chunked") if counts[kind]
    )


def _group(fields: Fields, kind: str, num_layers: int, head_dim: int) -> AttentionGroup:
    heads = fields.count("num_key_value_heads", "n_head_kv", default=fields.count("num_attention_heads"))
    window = None
    if kind == "sliding":
        window = fields.count("sliding_window")
    elif kind == "chunked":
        window = fields.count("attention_chunk_size", "sliding_window", default=8192)
    elif fields.get("kv_lora_rank"):
        indexer = fields.count("index_head_dim", default=0)
        return AttentionGroup(
            kind="mla",
            num_layers=num_layers,
            num_key_value_heads=1,
            head_dim=head_dim,
            latent_dim=fields.count("kv_lora_rank") + fields.count("qk_rope_head_dim"),
            indexer_bytes=indexer + 4 * -(-indexer // 128),  # fp8 keys and a float32 scale per 128
        )
    else:  # Gemma 4 gives its global layers other heads
        heads = fields.count("num_global_key_value_heads", default=heads)
        head_dim = fields.count("global_head_dim", default=head_dim)
    return AttentionGroup(kind, num_layers, heads, head_dim, window)


def _compressed_groups(fields: Fields, ratios: list[int], num_layers: int, head_dim: int) -> tuple[AttentionGroup, ...]:
    """DeepSeek-V4: one key-value vector a layer for every ratio-th token; 0 keeps a window."""
    indexer = fields.count("index_head_dim", default=0)
    window = fields.count("sliding_window", default=128)
    return tuple(
        AttentionGroup(
            kind="compressed",
            num_layers=count,
            num_key_value_heads=1,
            head_dim=head_dim,
            window=None if ratio else window,
            indexer_bytes=round((indexer + 4) / ratio) if ratio else 0,
            compress_ratio=float(ratio or 1),
        )
        for ratio, count in sorted(Counter(ratios[:num_layers]).items())
    )


def state_groups(fields: Fields, num_layers: int) -> tuple[StateGroup, ...]:
    """Linear-attention (gated delta net) and Mamba layers with their state per sequence."""
    if fields.get("compress_ratios"):
        return ()
    counts = Counter(layer_kinds(fields, num_layers))
    ssm_bytes = 4 if fields.get("mamba_ssm_dtype") == "float32" else 2
    groups = []
    if counts["linear"]:
        key, value = linear_dims(fields)
        head = fields.count("linear_key_head_dim", default=128)
        kernel = fields.count("linear_conv_kernel_dim", default=4)
        conv = (2 * key + value) * (kernel - 1)
        groups.append(StateGroup(counts["linear"], conv, value * head, ssm_bytes))
    if counts["mamba"]:
        inner, state, n_groups = mamba_dims(fields)
        kernel = fields.count("conv_kernel", "mamba_d_conv", default=4)
        conv = (inner + 2 * n_groups * state) * (kernel - 1)
        groups.append(StateGroup(counts["mamba"], conv, inner * state, ssm_bytes))
    return tuple(groups)


def linear_dims(fields: Fields) -> tuple[int, int]:
    """Total key and value width of a gated-delta-net layer."""
    key = fields.count("linear_num_key_heads") * fields.count("linear_key_head_dim")
    value = fields.count("linear_num_value_heads") * fields.count("linear_value_head_dim")
    return key, value


def mamba_dims(fields: Fields) -> tuple[int, int, int]:
    """Inner width, state size and groups of a Mamba-2 layer."""
    heads = fields.count("mamba_num_heads", "mamba_n_heads", default=0)
    inner = heads * fields.count("mamba_head_dim", "mamba_d_head", default=64)
    inner = inner or fields.count("mamba_expand", default=2) * fields.count("hidden_size")
    state = fields.count("ssm_state_size", "mamba_d_state", default=128)
    return inner, state, fields.count("n_groups", "mamba_n_groups", default=1)


def moe_spec(fields: Fields, num_layers: int) -> MoeSpec | None:
    """Experts of one MoE layer, None for a dense model."""
    experts = fields.count("num_local_experts", "num_experts", "n_routed_experts", default=0)
    if experts <= 1:
        return None
    width = fields.count("moe_intermediate_size", "intermediate_size_moe", "intermediate_size")
    if fields.get("model_type", "").startswith("llama4"):
        width = fields.count("intermediate_size")  # the dense layers use intermediate_size_mlp
    shared = fields.count("n_shared_experts", "num_shared_experts", default=0) * width
    shared = fields.count("shared_expert_intermediate_size", default=shared)
    if fields.get("model_type", "").startswith("llama4"):
        shared = width
    return MoeSpec(
        num_experts=experts,
        num_experts_per_tok=fields.count("num_experts_per_tok", "top_k_experts", "moe_top_k", default=2),
        moe_intermediate_size=width,
        shared_intermediate_size=shared,
        num_moe_layers=_moe_layers(fields, num_layers),
    )


def _moe_layers(fields: Fields, num_layers: int) -> int:
    if pattern := fields.get("hybrid_override_pattern"):
        return int(pattern.count("E"))
    step = fields.count("decoder_sparse_step", "interleave_moe_layer_step", default=1) or 1
    dense = fields.count("first_k_dense_replace", default=0) + len(fields.get("mlp_only_layers", []))
    return max(0, num_layers // step - dense)


def vision_spec(config: Mapping[str, Any]) -> VisionSpec | None:
    """Patches, pixels and widths behind one image token, None for a text model."""
    tower = (config.get("thinker_config") or config).get("vision_config")
    if not isinstance(tower, Mapping):
        return None
    fields = Fields(tower, "vision_config")
    patch = fields.count("patch_size", default=14)
    side = fields.count("image_size", default=0)
    if per_image := config.get("mm_tokens_per_image"):  # Gemma 3 pools a whole image into 256 tokens
        patches = max(1, (side // patch) ** 2 // int(per_image))
    else:
        shuffle = round(1 / float(fields.get("pixel_shuffle_ratio", 1)))
        merge = fields.get("merge_kernel_size") or [config.get("spatial_merge_size", shuffle)]
        patches = fields.count("spatial_merge_size", default=int(merge[0])) ** 2
    frames = fields.count("temporal_patch_size", default=1)
    hidden = fields.count("hidden_size", "width", default=1024)
    dynamic = str(config.get("model_type", "")).startswith(("qwen2", "qwen3"))  # any resolution
    return VisionSpec(
        patches_per_token=patches,
        pixels_per_token=patches * patch * patch * frames,
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size", default=4 * hidden),
        max_tokens_per_item=16384 if dynamic else 0,
    )
