"""A workload file: the body of its sessions and how one is drawn."""

from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from kit.workload.arrivals import Arrivals
from kit.workload.distribution import Distribution, Model
from kit.workload.session import Session, Turn


class Prefix(Model):
    """System prompt and tools; `variants` of them exist, each session has one."""

    tokens: NonNegativeInt = 0
    variants: PositiveInt = 1


class Pause(Model):
    """A reason to wait between turns, chosen with its weight."""

    kind: str
    weight: PositiveFloat = 1.0
    seconds: Distribution


class Compaction(Model):
    """A context above `above_tokens` is replaced by a summary before the next turn."""

    above_tokens: PositiveInt
    to_tokens: Distribution

    def apply(self, rng: np.random.Generator, session: Session) -> None:
        """Set `compact_to` where the session's context calls for it."""
        context = session.shared_prefix_tokens
        for turn in session.turns:
            if context + turn.new_tokens > self.above_tokens and turn is not session.turns[0]:
                turn.compact_to = self.to_tokens.tokens(rng, 1)[0]
                context = session.shared_prefix_tokens + turn.compact_to
            context += turn.new_tokens + turn.output_len


class Subagents(Model):
    """With this probability a turn starts sub-agents, all at once, and waits for all of them."""

    probability: float = Field(ge=0, le=1)
    agents: Distribution
    session: "Body"

    def apply(self, rng: np.random.Generator, parent: Session) -> None:
        """Give turns of the parent, but never its last, their children."""
        for turn in parent.turns[:-1]:
            if rng.random() < self.probability:
                agents = self.agents.tokens(rng, 1)[0]
                turn.children = [self.session.draw(rng, parent.key, 0.0) for _ in range(agents)]
                for child in turn.children:
                    child.prefix_id += 1_000_000  # a sub-agent has a system prompt of its own


class Body(Model):
    """What one session does."""

    turns: Distribution
    shared_prefix: Prefix = Prefix()
    first_new_tokens: Distribution
    new_tokens: Distribution
    output_len: Distribution
    pauses: tuple[Pause, ...] = ()
    compaction: Compaction | None = None
    subagents: Subagents | None = None

    def draw(self, rng: np.random.Generator, key: int, arrival_s: float) -> Session:
        """A session with all its turns."""
        count = self.turns.tokens(rng, 1)[0]
        new = self.first_new_tokens.tokens(rng, 1) + self.new_tokens.tokens(rng, count - 1)
        turns = [Turn(*pair) for pair in zip(new, self.output_len.tokens(rng, count), strict=True)]
        self._draw_pauses(rng, turns)
        prefix_id = int(rng.integers(self.shared_prefix.variants))
        session = Session(key, arrival_s, turns, prefix_id, self.shared_prefix.tokens)
        for rule in (self.compaction, self.subagents):
            if rule is not None:
                rule.apply(rng, session)
        return session

    def _draw_pauses(self, rng: np.random.Generator, turns: list[Turn]) -> None:
        if not self.pauses or len(turns) == 1:
            return
        weights = np.array([pause.weight for pause in self.pauses])
        chosen = rng.choice(len(weights), size=len(turns) - 1, p=weights / weights.sum())
        for index, pause in enumerate(self.pauses):
            places = np.flatnonzero(chosen == index).tolist()
            seconds = pause.seconds.sample(rng, len(places)).tolist()
            for place, pause_s in zip(places, seconds, strict=True):
                turns[place].pause_after_s, turns[place].pause_kind = pause_s, pause.kind


class Slo(Model):
    """Limits per turn; None: the workload has none."""

    ttft_s: PositiveFloat | None = None
    tpot_s: PositiveFloat | None = None


class Source(Model):
    """Where figures of the file come from."""

    what: str
    source: str
    date: str


class Workload(Model):
    """Arrivals and body, with the limits that suit them and where the figures come from."""

    description: str
    counts: Literal["sessions", "calls"]  # what one arrival stands for
    arrivals: Arrivals
    session: Body
    slo: Slo = Slo()
    sources: list[Source] = Field(min_length=1)
