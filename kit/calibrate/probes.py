"""What is sent, within a share of the budget each, and what came back as sessions that the simulator can play."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.loadgen import Level
from kit.scheduler import SchedulerConfig
from kit.workload import Session, Turn

Floats = npt.NDArray[np.float64]
LADDER = (4, 16, 64, 256)
SHARES = {"one": 0.12, "prefill": 0.12, "streams": 0.12, "contexts": 0.1, "burst": 0.08, "return": 0.1}  # of the budget
SLACK_S = 0.002  # a slot's next request leaves within this of the answer before
COLUMNS = ("session", "turn", "asked_len", "sent_s", "first_s", "end_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Measured:
    """One probe as it went: COLUMNS of its completed requests, and what the server told of itself."""

    name: str
    slots: int | None  # of a closed loop
    rows: dict[str, list[float]]
    duration_s: float
    told: dict[str, Any]

    def column(self, name: str) -> Floats:
        """One of COLUMNS."""
        return np.array(self.rows[name], float)

    @property
    def ttft_s(self) -> Floats:
        """Time to first token of each request."""
        return self.column("first_s") - self.column("sent_s")

    @property
    def tpot_s(self) -> Floats:
        """Time per token after the first; NaN for an answer of one token."""
        rest = self.column("output_tokens") - 1
        return (self.column("end_s") - self.column("first_s")) / np.where(rest > 0, rest, np.nan)

    def groups(self) -> list[str]:
        """Which requests are alike: by prompt length where few were asked for, and turns that return."""
        asked, returns = self.column("asked_len"), self.column("turn") > 0
        few = len(set(asked)) <= len(LADDER) and not returns.any()
        return [
            "return" if again else f"{length:.0f}" if few else "" for length, again in zip(asked, returns, strict=True)
        ]

    def at_once(self) -> Floats:
        """Requests at the server as each one came, itself included."""
        sent, end = self.column("sent_s"), np.sort(self.column("end_s"))
        rank = np.argsort(np.argsort(sent, kind="stable"), kind="stable")
        return np.asarray(rank + 1.0 - np.searchsorted(end, sent, "right"), float)

    def chains(self) -> list[list[int]]:
        """Indices of the requests that followed each other: turns of a session, or what one slot sent."""
        sent, end, chains = self.column("sent_s"), self.column("end_s"), dict[float, list[int]]()
        for index in np.argsort(sent, kind="stable").tolist():
            key = self.rows["session"][index]
            if self.slots:
                free = [one for one, chain in chains.items() if end[chain[-1]] <= sent[index] + SLACK_S]
                key = max(free, key=lambda one: end[chains[one][-1]], default=key)
            chains.setdefault(key, []).append(index)
        return list(chains.values())


def sessions(measured: Measured, chains: list[list[int]], delay_s: Floats) -> list[Session]:
    """The probe for the simulator: lengths, arrivals and pauses as they were, each request `delay_s` after its send."""
    sent, end = measured.column("sent_s"), measured.column("end_s")
    prompt, output = (measured.column(name).astype(int).tolist() for name in ("prompt_tokens", "output_tokens"))
    begin, made = sent.min(), []
    for key, chain in enumerate(chains):
        turns: list[Turn] = []
        for before, index in zip([-1, *chain], chain, strict=False):
            grown = prompt[before] + output[before] if turns and not measured.slots else 0
            new, fresh = prompt[index] - grown, bool(turns) and (measured.slots is not None or prompt[index] <= grown)
            if turns:
                turns[-1].pause_after_s = max(0.0, sent[index] - end[before] + delay_s[index])
            turns.append(Turn(prompt[index] if fresh else new, output[index], compact_to=0 if fresh else None))
        first = chain[0]
        made.append(Session(key, float(sent[first] - begin + delay_s[first]), turns))
    return sorted(made, key=lambda session: session.arrival_s)


def plan(limits: SchedulerConfig, budget_s: float, cost_s: Callable[[int, int, int], float]) -> Iterator[Level]:
    """The probes in order, made as they are asked for; `cost_s` tells seconds of (streams, prompt, output) by then."""
    room = min(limits.max_model_len, limits.kv_blocks * limits.block_size // 2)

    def fit(share: str, streams: int, prompt: int, output: int) -> int:
        """The prompt length, halved until two rounds of it fit in the share."""
        prompt = min(prompt, (room // streams if streams > 1 else room) - output)
        while prompt > 32 and 2 * cost_s(streams, prompt, output) > SHARES[share] * budget_s:
            prompt //= 2
        return max(1, prompt)

    def loop(name: str, streams: int, lengths: list[tuple[int, int]], requests: int) -> Level:
        source = islice(cycle(lengths), requests)
        each = [Session(key, 0.0, [Turn(*pair)]) for key, pair in enumerate(source)]
        share_s = SHARES[name.split("-")[0]] * budget_s
        return Level(name, each, "concurrency", streams, streams, duration_s=share_s)

    top = fit("one", 1, 2048, 64)
    yield loop("one", 1, [(max(1, top // part), 64) for part in (64, 8, 2, 1)], 40)
    top = fit("prefill", 1, 32768, 8)
    yield loop("prefill", 1, [(max(1, top // part), 8) for part in (8, 4, 2, 1)], 16)
    rng = np.random.default_rng(0)
    for streams in (one for one in LADDER if one <= limits.max_num_seqs):
        mean = fit("streams", streams, 640, 128)
        requests = int(30 * streams**0.6)  # 17 rounds of 4 streams, 3 of 256: a median of 60 and more
        yield loop(f"streams-{streams}", streams, _spread(rng, requests, mean, 128), requests)
    streams = min(16, limits.max_num_seqs)
    mean = fit("contexts", streams, 8192, 128)
    yield loop("contexts", streams, _spread(rng, 4 * streams, mean, 128), 4 * streams)
    yield _burst(limits, budget_s * SHARES["burst"] / 3, cost_s)
    prompt = fit("return", 8, 3072, 64)
    turns = [Turn(prompt, 64), *(Turn(max(1, prompt // 8), 64) for _ in range(3))]
    for turn in turns[:-1]:
        turn.pause_after_s = SHARES["return"] * budget_s / 12
    each = [Session(key, key * 0.4 * turns[0].pause_after_s, turns) for key in range(min(8, limits.max_num_seqs))]
    yield Level("return", each, "sessions", duration_s=SHARES["return"] * budget_s)


def _spread(rng: np.random.Generator, count: int, prompt: int, output: int) -> list[tuple[int, int]]:
    """Lengths between half and one and a half of the means, so that streams do not march in step."""
    drawn = rng.uniform(0.5, 1.5, (count, 2)) * (prompt, output)
    return [(max(1, int(new)), max(2, int(out))) for new, out in drawn]


def _burst(limits: SchedulerConfig, wave_s: float, cost_s: Callable[[int, int, int], float]) -> Level:
    """Three waves at once: many short prompts, then fewer long ones; each as large as its third of the share allows."""
    made, at_s = list[Session](), 0.0
    for count, prompt in ((64, 64), (64, 512), (32, 2048)):
        size = min(count, limits.max_num_seqs, max(1, limits.kv_blocks * limits.block_size // (prompt + 1)))
        while size > 1 and cost_s(size, prompt, 1) > wave_s:
            size //= 2
        made += [Session(len(made) + key, at_s, [Turn(prompt, 1)]) for key in range(size)]
        at_s += 1.5 * max(cost_s(size, prompt, 1), wave_s / 3)
    return Level("burst", made, "sessions")
