"""A machine that is not the modelled one: speeds, overheads, KV pool and stalls drawn from a seed."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from kit.catalog.paths import DATA, load_yaml
from kit.scheduler import SchedulerConfig, StepTime


class HiddenStepTime:
    """`nominal` on another machine: its decode part by bandwidth, the rest by compute; overheads, stalls."""

    def __init__(self, nominal: StepTime, seed: int) -> None:
        self.nominal, self.rng = nominal, np.random.default_rng([seed, 20261])
        spans = load_yaml(DATA / "emulator.yaml")["truth"]
        self.truth = SimpleNamespace(**{name: np.exp(self.rng.uniform(*np.log(span))) for name, span in spans.items()})
        self.request_s = getattr(nominal, "request_s", lambda *_: 0.0)  # of API and tokeniser: as modelled
        self.to_stall = self.rng.exponential()  # in mean distances, of time at work

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill, now and then with a stall."""
        prompts_s = self.nominal.step_s(chunks, decodes, context) - self.nominal.step_s((), decodes, context)
        base_s, per_token_s = self.decode_line(decodes)
        added_s = prompts_s / self.truth.compute_factor + len(chunks) * self.truth.request_s
        step_s = base_s + per_token_s * context + float(added_s)
        self.to_stall -= step_s / self.truth.stall_every_s
        if self.to_stall < 0:
            self.to_stall = self.rng.exponential()
            step_s += self.truth.stall_s
        return step_s

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step without stalls: a constant, and per KV token that the rows read."""
        base_s, per_token_s = (float(part / self.truth.bandwidth_factor) for part in self.nominal.decode_line(decodes))
        return base_s + self.truth.step_s + decodes * self.truth.row_s, per_token_s


def hide(seed: int, limits: SchedulerConfig, nominal: StepTime) -> tuple[SchedulerConfig, HiddenStepTime]:
    """Limits and step times of the machine of that seed, the same on every call."""
    hidden = HiddenStepTime(nominal, seed)
    return replace(limits, kv_blocks=max(1, int(limits.kv_blocks * hidden.truth.kv_cache_factor))), hidden
