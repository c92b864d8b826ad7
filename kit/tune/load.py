"""The load of a tuning: the workload as it arrives, with its burst, and slots in which its turns are always ready."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from kit.simulator import Load
from kit.workload import Session, Turn, Workload

SPARE = 3  # turns of a slot over the mean: short ones make a slot fast


@dataclass(frozen=True, slots=True)
class Offer:
    """What the open loop offers in `duration_s`: the workload's own arrivals or so many sessions, and a burst."""

    workload: Workload
    duration_s: float
    sessions: int | None = None  # expected within the duration; None: the workload's own rate
    burst: int | None = None  # sessions at once, at half of the duration

    def arriving(self, seed: int) -> list[Session]:
        """The sessions of the open loop, by arrival; the same for the same seed."""
        return list(Load(self.workload, self.sessions, self.duration_s, self.burst, seed).stream()[0])

    def ready(self, slots: int, seed: int, turns: int) -> list[Session]:
        """A session for each slot, enough for `turns` turns in all: those of sessions of the workload, without pauses.

        A slot begins in the middle of a session, as a server finds them. Pauses are left out so that every slot
        always has a turn in flight; what they cost in cache hits is seen by the open loop. Sub-agents take
        slots of their own.
        """
        each = SPARE * ceil(turns / slots) + SPARE
        return [self._slot(np.random.default_rng([seed, 3, key]), key, each) for key in range(slots)]

    def _slot(self, rng: np.random.Generator, key: int, turns: int) -> Session:
        supply = self._flat(rng, key)
        first = next(supply)
        begun, lengths = int(rng.integers(len(first.turns))), first.input_lens()
        seen = lengths[begun] - first.shared_prefix_tokens
        slot = [replace(first.turns[begun], new_tokens=seen, compact_to=None), *first.turns[begun + 1 :]]
        while len(slot) < turns:
            session = next(supply)
            slot += [replace(session.turns[0], compact_to=0), *session.turns[1:]]
        kept: list[Turn] = [replace(turn, pause_after_s=0.0, pause_kind="", children=()) for turn in slot[:turns]]
        return Session(key, 0.0, kept, first.prefix_id, first.shared_prefix_tokens)

    def _flat(self, rng: np.random.Generator, key: int) -> Iterator[Session]:
        """Sessions, each followed by its sub-agents' ones."""
        while True:
            session = self.workload.session.draw(rng, key, 0.0)
            yield session
            yield from (child for turn in session.turns for child in turn.children)
