"""Step times as integers, so that a run of steps in closed form equals its steps one by one."""

from collections.abc import Sequence
from typing import Protocol

from kit.scheduler import Batch

TICKS_PER_S = 10**15


class StepTime(Protocol):
    """What a step-time model offers; chunks are (new tokens, tokens before them)."""

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill; `context` is the KV tokens that the decode rows read."""
        ...

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        ...


class StepClock:
    """Ticks of planned batches; one for all replicas, so that each line is asked for once."""

    def __init__(self, step_time: StepTime) -> None:
        self.step_time = step_time
        self._lines: dict[int, tuple[int, int]] = {}

    def ticks(self, batch: Batch) -> tuple[int, int]:
        """Ticks of the first step of a batch, and by how much each later one is longer."""
        if batch.chunks:
            chunks = [(tokens, before) for _, tokens, before in batch.chunks]
            return _ticks(self.step_time.step_s(chunks, batch.decodes, batch.context)), 0
        line = self._lines.get(batch.decodes)
        if line is None:
            base_s, per_token_s = self.step_time.decode_line(batch.decodes)
            line = self._lines[batch.decodes] = _ticks(base_s), round(per_token_s * TICKS_PER_S)
        return line[0] + line[1] * batch.context, line[1] * batch.decodes


def _ticks(seconds: float) -> int:
    return max(1, round(seconds * TICKS_PER_S))
