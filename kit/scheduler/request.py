"""What a scheduler is told and what it plans: limits, calls, steps and who times them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kit.scheduler.pool import Path


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy of one replica; tokens, blocks and counts."""

    kv_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 1 << 30
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None  # of prompts without a first token
    queued_reqs_include_running: bool = True  # as vLLM counts them; False: those that wait (SGLang)
    enable_prefix_caching: bool = True
    mixed_steps: bool = True  # False: a step is prefill or decode, prefill first (SGLang)
    reserve_own_output_fraction: float = 0.0  # admission keeps room for this share of its output
    reserve_running_output_fraction: float = 0.0  # ... and of what running requests still generate


class Request:
    """One call: what the caller fills in, and the scheduler's state of it."""

    __slots__ = (
        "blocks", "computed", "decoding", "generated", "hit_tokens", "input_len", "key", "offset", "order",
        "output_len", "owner", "path", "preemptions", "shared", "target", "times",
    )  # fmt: skip

    def __init__(self, key: int, input_len: int, output_len: int, path: Path = (), owner: Any = None) -> None:
        self.key, self.input_len, self.output_len = key, input_len, output_len
        self.path, self.owner = path, owner
        self.target = input_len  # tokens to prefill: more after a preemption
        self.generated = self.preemptions = self.computed = self.blocks = self.shared = 0
        self.order = 0  # of admission
        self.decoding, self.offset = False, 0  # a decode row holds `offset` plus the decode clock KV tokens
        self.hit_tokens = -1  # prompt tokens found in the prefix cache, -1 before admission
        self.times: list[Any] = []  # the caller's own


class Batch:
    """One planned step: prefill chunks (request, tokens, context before) and decode rows."""

    __slots__ = ("admitted", "chunks", "context", "decodes", "preempted")

    def __init__(self) -> None:
        self.chunks: list[tuple[Request, int, int]] = []
        self.admitted: list[Request] = []  # requests that leave the queue with this step
        self.preempted: list[Request] = []
        self.decodes = 0  # rows that generate one token each
        self.context = 0  # KV tokens that the decode rows read, in all


class StepTime(Protocol):
    """What a step-time model offers; chunks are (new tokens, tokens before them)."""

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill; `context` is the KV tokens that the decode rows read."""
        ...

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        ...
