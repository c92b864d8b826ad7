"""Step times as integers, so that a run of steps in closed form equals its steps one by one."""

from collections.abc import Callable
from types import EllipsisType

from kit.scheduler import Batch, StepTime

TICKS_PER_S = 10**15
RequestTime = Callable[[int, int], float]  # seconds of a prompt's tokens and the requests there at once


class StepClock:
    """Ticks of planned batches and of API and tokeniser; one for all replicas, so that each line is asked for once."""

    def __init__(self, step_time: StepTime, request_s: RequestTime | EllipsisType | None = ...) -> None:
        self.step_time = step_time
        own: RequestTime | None = getattr(step_time, "request_s", None)
        self._request_s = own if isinstance(request_s, EllipsisType) else request_s
        self._lines: dict[int, tuple[int, int]] = {}

    def request_ticks(self, input_len: int, at_once: int) -> int:
        """Ticks of API and tokeniser before the scheduler sees a prompt."""
        return round(self._request_s(input_len, at_once) * TICKS_PER_S) if self._request_s else 0

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
