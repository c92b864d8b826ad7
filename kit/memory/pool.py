"""From bytes of KV pool to blocks, tokens and sequences: layer groups, windows, state pages."""

from dataclasses import dataclass
from math import ceil

from kit.catalog import AttentionGroup, ModelSpec
from kit.engine_config import ResolvedConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """How vLLM cuts the pool of one rank into equal blocks."""

    block_size: int  # tokens
    block_bytes: float  # one block over the layers of one group
    full_groups: int
    windows: tuple[int, ...]  # one window per sliding group
    state_groups: int
    state_blocks: int  # blocks of each state group that a sequence holds

    @property
    def num_groups(self) -> int:
        """Groups that share the pool."""
        return self.full_groups + len(self.windows) + self.state_groups

    def blocks_per_sequence(self, context_tokens: int, max_num_batched_tokens: int) -> int:
        """Blocks that a sequence of that many tokens holds over all groups."""
        full = ceil(context_tokens / self.block_size) * self.full_groups
        state = self.state_groups * self.state_blocks
        sliding = sum(
            min(
                ceil(min(window - 1 + max_num_batched_tokens, context_tokens) / self.block_size) + 1,
                ceil(context_tokens / self.block_size),
            )
            for window in self.windows
        )
        return full + sliding + state


def layout(model: ModelSpec, config: ResolvedConfig, num_layers_fraction: float, state_blocks: int) -> Layout:
    """The layout of one rank: uniform models have one group, hybrids equal groups with padding."""
    tensor, kv_bytes = config.tensor_parallel_size, config.kv_dtype_bytes
    attention = [group for group in model.attention if group.num_layers]
    counts = {id(group): max(1, round(group.num_layers * num_layers_fraction)) for group in attention}
    per_token = {id(group): group.bytes_per_token(kv_bytes, tensor) for group in attention}
    state_layers = round(sum(g.num_layers for g in model.state) * num_layers_fraction)
    block_size = config.block_size
    if len(attention) == 1 and not state_layers and attention[0].window is None:
        block_bytes = block_size * per_token[id(attention[0])] * counts[id(attention[0])]
        return Layout(block_size, block_bytes, 1, (), 0, state_blocks)
    if any(group.kind == "compressed" for group in attention) or not attention:
        return _compressed_layout(model, attention, per_token, counts, config)
    widest = max(per_token.values())
    if state_layers:
        state_page = max(g.bytes_per_sequence(tensor) for g in model.state)
        block_size = ceil(state_page / widest / 16) * 16
    layers = [counts[id(group)] for group in attention] + ([state_layers] if state_layers else [])
    size = group_size(layers)
    windows = tuple(
        group.window for group in attention if group.window is not None for _ in range(ceil(counts[id(group)] / size))
    )
    full = sum(ceil(counts[id(g)] / size) for g in attention if g.window is None)
    return Layout(block_size, block_size * widest * size, full, windows, ceil(state_layers / size), state_blocks)


def group_size(layers: list[int]) -> int:
    """Layers of one group: the smallest kind's count, the largest's where they are nearly equal.

    >>> group_size([16, 48]), group_size([12, 13]), group_size([5, 29])
    (16, 13, 5)
    """
    low, high = min(layers), max(layers)
    return high if high < 1.5 * low else low


def _compressed_layout(
    model: ModelSpec,
    attention: list[AttentionGroup],
    per_token: dict[int, float],
    counts: dict[int, int],
    config: ResolvedConfig,
) -> Layout:
    """Compressed caches and pure state models: an average cost per token, no page is known."""
    per_block = sum(
        config.block_size * per_token[id(group)] * counts[id(group)] for group in attention if group.window is None
    )
    state = sum(g.num_layers * g.bytes_per_sequence(config.tensor_parallel_size) for g in model.state)
    return Layout(config.block_size, per_block or max(state, 1.0), 1 if per_block else 0, (), 0, 1)
