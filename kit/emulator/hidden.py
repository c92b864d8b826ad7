"""A machine that is not the modelled one: speeds, overheads, KV pool and stalls drawn from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kit.catalog.paths import DATA, load_yaml
from kit.scheduler import SchedulerConfig, StepTime


@dataclass(frozen=True, slots=True)
class Truth:
    """Factors on the model's speeds and pool, seconds added; data/emulator.yaml says to what."""

    bandwidth_factor: float
    compute_factor: float
    kv_cache_factor: float
    step_s: float
    row_s: float
    request_s: float
    stall_every_s: float
    stall_s: float


def truth(seed: int) -> Truth:
    """The machine of that seed, the same on every call."""
    rng, spans = np.random.default_rng([seed, 20261]), load_yaml(DATA / "emulator.yaml")["truth"]
    return Truth(**{name: float(np.exp(rng.uniform(*np.log(span)))) for name, span in spans.items()})


@dataclass(frozen=True, slots=True)
class HiddenStepTime:
    """`nominal` on another machine: its decode part by bandwidth, the rest by compute, and overheads."""

    nominal: StepTime
    truth: Truth

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, context: int) -> float:
        """Seconds of a step with prefill."""
        prompts_s = self.nominal.step_s(chunks, decodes, context) - self.nominal.step_s((), decodes, context)
        base_s, per_token_s = self.decode_line(decodes)
        added_s = prompts_s / self.truth.compute_factor + len(chunks) * self.truth.request_s
        return base_s + per_token_s * context + added_s

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Seconds of a pure decode step: a constant, and per KV token that the rows read."""
        base_s, per_token_s = (part / self.truth.bandwidth_factor for part in self.nominal.decode_line(decodes))
        return base_s + self.truth.step_s + decodes * self.truth.row_s, per_token_s


def hide(hidden: Truth, limits: SchedulerConfig, nominal: StepTime) -> tuple[SchedulerConfig, StepTime]:
    """Limits and step times of that machine, its stalls aside."""
    blocks = max(1, int(limits.kv_blocks * hidden.kv_cache_factor))
    return replace(limits, kv_blocks=blocks), HiddenStepTime(nominal, hidden)
