"""Small frozen shapes and the reader of config.json fields; imports nothing but errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kit.errors import UserError


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Layers that cache alike: kind is full, sliding, chunked, mla or compressed."""

    kind: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    window: int | None = None  # tokens; None keeps the whole context
    latent_dim: int = 0  # MLA: kv_lora_rank + qk_rope_head_dim
    indexer_bytes: int = 0  # sparse attention's own key cache, per token
    compress_ratio: float = 1.0  # tokens per cached entry

    def bytes_per_token(self, kv_dtype_bytes: float, tensor_parallel_size: int = 1) -> float:
        """Bytes per token of one layer on one rank; KV heads are duplicated beyond their number."""
        if self.kind == "mla":  # the latent vector is replicated on every rank
            if self.indexer_bytes and kv_dtype_bytes == 1:  # packed: fp8 latents, float32 scales, bf16 rope
                return 656 + self.indexer_bytes
            return self.latent_dim * kv_dtype_bytes + self.indexer_bytes
        if self.kind == "compressed":
            return self.head_dim * kv_dtype_bytes / self.compress_ratio + self.indexer_bytes
        heads = -(-self.num_key_value_heads // tensor_parallel_size)
        return 2 * heads * self.head_dim * kv_dtype_bytes


@dataclass(frozen=True, slots=True)
class StateGroup:
    """State-space or linear-attention layers: a fixed state per sequence instead of a cache."""

    num_layers: int
    conv_elements: int  # per layer and sequence, 16 bit
    ssm_elements: int
    ssm_bytes: int  # 4 where the config asks for float32

    def bytes_per_sequence(self, tensor_parallel_size: int = 1) -> float:
        """State bytes of one layer and one sequence on one rank."""
        elements = 2 * self.conv_elements + self.ssm_bytes * self.ssm_elements
        return elements / tensor_parallel_size


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Mixture of experts: sizes of one MoE layer."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int  # all shared experts together, 0 without
    num_moe_layers: int


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """What a vision tower costs a profiling run, per token handed to the language model."""

    patches_per_token: int
    pixels_per_token: int
    hidden_size: int
    intermediate_size: int
    max_tokens_per_item: int  # the largest image that the engine profiles with


class Fields:
    """Typed look-up in a config.json that names file and field when one is missing or broken."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value, the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, *names: str, default: int | None = None) -> int:
        """A non-negative integer under the first of the names that is present."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{self.where}: {name} must be a whole number >= 0, got {value!r}")
            if value == 0 and default is None:
                raise UserError(f"{self.where}: {name} must be above 0")
            return value
        if default is None:
            raise UserError(f"{self.where}: config.json lacks {' or '.join(names)}")
        return default
