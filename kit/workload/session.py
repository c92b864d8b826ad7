"""A session: its turns, and the rule by which its context grows."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Turn:
    """One model call of a session; tokens and seconds."""

    new_tokens: int
    output_len: int
    pause_after_s: float = 0.0
    pause_kind: str = ""  # the tool class or "human"; "" after the last turn
    compact_to: int | None = None
    children: Sequence["Session"] = ()  # spawned when this turn has ended


@dataclass(slots=True)
class Session:
    """One conversation or task; a child's `arrival_s` counts from the end of the spawning turn."""

    key: int
    arrival_s: float
    turns: list[Turn]
    prefix_id: int = 0
    shared_prefix_tokens: int = 0
    path: tuple[tuple[int, int], ...] = ()  # traces: (extent, tokens at its end) of the first turn

    def input_lens(self) -> list[int]:
        """Prompt tokens of every turn under the context rule.

        >>> turns = [Turn(100, 20), Turn(30, 20), Turn(5, 9, compact_to=50)]
        >>> Session(0, 0.0, turns, shared_prefix_tokens=1000).input_lens()
        [1100, 1150, 1055]
        """
        lengths, own = [], 0
        for turn in self.turns:
            own = (own if turn.compact_to is None else turn.compact_to) + turn.new_tokens
            lengths.append(self.shared_prefix_tokens + own)
            own += turn.output_len
        return lengths
