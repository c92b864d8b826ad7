"""What is sent, each within its share of the budget, and what came back as sessions that the simulator can play."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from kit.loadgen import Level
from kit.scheduler import SchedulerConfig
from kit.workload import Session, Turn

Floats = npt.NDArray[np.float64]
# Closed loops: streams, prompt and output tokens, requests, share of the budget; a stream of its own takes fractions
# of the prompt in turn, several take lengths between half and one and a half so that they do not march in step.
LOOPS = {
    "one": (1, 2048, 64, 40, 0.12), "prefill": (1, 32768, 8, 16, 0.12), "streams-4": (4, 640, 128, 68, 0.12),
    "streams-16": (16, 640, 128, 158, 0.12), "streams-64": (64, 640, 128, 363, 0.12),
    "streams-256": (256, 640, 128, 835, 0.12), "contexts": (16, 8192, 128, 64, 0.1),
}  # fmt: skip
PARTS = {"one": (64, 8, 2, 1), "prefill": (8, 4, 2, 1)}
BURST, WAVES = 0.08, ((64, 64), (64, 512), (32, 2048))  # requests at once and their prompts, of one token each
RETURN, FIRST_TOKENS, MORE_TOKENS = 0.1, 3072, 384  # sessions of four turns with pauses
SLACK_S = 0.002  # a slot's next request leaves within this of the answer before
COLUMNS = ("session", "turn", "asked_len", "sent_s", "first_s", "end_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Measured:
    """One probe as it went: COLUMNS of its completed requests in order, and what else was told of it."""

    name: str
    slots: int | None  # of a closed loop
    rows: dict[str, list[float]]
    duration_s: float
    told: dict[str, Any]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """COLUMNS, `ttft_s`, `tpot_s`; `at_once`, the requests at the server as each came; `group`, who is alike."""
        rows = pd.DataFrame(self.rows)
        rows["ttft_s"], rows["tpot_s"] = latencies(
            rows["sent_s"], rows["first_s"], rows["end_s"], rows["output_tokens"]
        )
        ended = np.searchsorted(np.sort(rows["end_s"]), rows["sent_s"], "right")
        rows["at_once"] = rows["sent_s"].rank(method="first") - ended
        few = rows["asked_len"].nunique() <= max(map(len, PARTS.values()))
        alike = rows["asked_len"].map("{:.0f}".format) if few else ""
        rows["group"] = np.where(rows["turn"] > 0, "return", "first" if rows["turn"].any() else alike)
        return rows

    def chains(self) -> list[list[int]]:
        """Indices of the requests that followed each other: turns of a session, or what one slot sent."""
        sent, end, chains = np.array(self.rows["sent_s"]), self.rows["end_s"], dict[float, list[int]]()
        for index in np.argsort(sent, kind="stable").tolist():
            key = self.rows["session"][index]
            if self.slots:
                free = [one for one, chain in chains.items() if end[chain[-1]] <= sent[index] + SLACK_S]
                key = max(free, key=lambda one: end[chains[one][-1]], default=key)
            chains.setdefault(key, []).append(index)
        return list(chains.values())

    def sessions(self, chains: list[list[int]], delay_s: Floats) -> list[Session]:
        """Lengths, arrivals and pauses as they were, each request reaching the scheduler `delay_s` after its send."""
        reach, end = np.array(self.rows["sent_s"]) + delay_s, self.rows["end_s"]
        prompt, output = (list(map(int, self.rows[name])) for name in ("prompt_tokens", "output_tokens"))
        made = []
        for key, chain in enumerate(chains):
            turns, grown = list[Turn](), 0
            for before, index in zip([chain[0], *chain], chain, strict=False):
                if turns:
                    turns[-1].pause_after_s = max(0.0, reach[index] - end[before])
                anew = self.slots is not None or prompt[index] <= grown
                new = prompt[index] - (0 if anew else grown)
                turns.append(Turn(new, output[index], compact_to=0 if anew else None))
                grown = prompt[index] + output[index]
            made.append(Session(key, reach[chain[0]] - min(self.rows["sent_s"]), turns))
        return sorted(made, key=lambda session: session.arrival_s)


def latencies(sent_s: Any, first_s: Any, end_s: Any, tokens: Any) -> tuple[Floats, Floats]:
    """TTFT and TPOT in s; an answer of one token has no TPOT."""
    return np.asarray(first_s - sent_s), np.asarray((end_s - first_s) / np.where(tokens > 1, tokens - 1, np.nan))


def plan(limits: SchedulerConfig, budget_s: float, cost_s: Callable[[int, int, int], float]) -> Iterator[Level]:
    """The probes, made as they are asked for; `cost_s`: seconds of so many requests at once of (prompt, output)."""
    rng, pool = np.random.default_rng(0), limits.kv_blocks * limits.block_size

    def fit(streams: int, prompt: int, output: int, seconds: float) -> int:
        """The prompt, shortened until it fits: in context and KV cache, and two rounds of it in the time."""
        prompt = min(prompt, limits.max_model_len - 2 * output, pool // 2 // streams - output)
        while prompt > 32 and 2 * cost_s(streams, prompt, output) > seconds:
            prompt //= 2
        return max(1, prompt)

    for name, (most, longest, output, requests, share) in LOOPS.items():
        streams, share_s = min(most, limits.max_num_seqs), share * budget_s
        if streams < most and name.startswith("streams"):
            continue
        prompt = fit(streams, longest, output, share_s)
        lengths = rng.uniform(0.5, 1.5, (requests, 2))
        if name in PARTS:
            lengths = np.stack([np.resize(1 / np.array(PARTS[name]), requests), np.ones(requests)], axis=1)
        each = np.maximum(1, lengths * (prompt, output)).astype(int).tolist()
        ends_s = max(share_s / 2, share_s - cost_s(streams, prompt, output))  # what is under way then still ends
        sessions = [Session(key, 0.0, [Turn(*pair)]) for key, pair in enumerate(each)]
        yield Level(name, sessions, "concurrency", streams, streams, duration_s=ends_s)
    yield _burst(limits, BURST * budget_s / len(WAVES), cost_s)
    prompt, pause_s = fit(8, FIRST_TOKENS, 64, RETURN * budget_s), RETURN * budget_s / 12
    turns = [Turn(prompt, 64, pause_s), *(Turn(min(prompt, MORE_TOKENS), 64, pause_s) for _ in range(3))]
    sessions = [Session(key, key * 0.4 * pause_s, turns) for key in range(min(8, limits.max_num_seqs))]
    yield Level("return", sessions, "sessions", duration_s=RETURN * budget_s)


def _burst(limits: SchedulerConfig, wave_s: float, cost_s: Callable[[int, int, int], float]) -> Level:
    """Waves at once: many short prompts, then fewer long ones, each as large as its share of the time allows."""
    made, at_s = list[Session](), 0.0
    for most, prompt in WAVES:
        size = min(most, limits.max_num_seqs, 1 + limits.kv_blocks * limits.block_size // (2 * prompt))
        while size > 1 and cost_s(size, prompt, 1) > wave_s:
            size //= 2
        made += [Session(len(made) + key, at_s, [Turn(prompt, 1)]) for key in range(size)]
        at_s += 1.5 * max(cost_s(size, prompt, 1), wave_s / 3)
    return Level("burst", made, "sessions")
