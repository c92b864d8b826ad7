"""Agent sessions: what one of them asks of a server, and when they come.

The interface that the simulator and the load generator share: an iterator of `Session`, ordered by
`arrival_s`. Sessions arrive open-loop. Turns inside a session are closed-loop: turn k + 1 is sent
`pause_after_s` after turn k has ended and after every child of turn k has ended (join).

Context rule: turn 0 sends `shared_prefix_tokens` (system prompt and tools, equal for all sessions
with the same `prefix_id`) followed by its `new_tokens`; each later turn sends everything before it
(prompts and outputs) followed by its own `new_tokens`. `compact_to` replaces the session's own
context (not the shared prefix) by a summary of that many tokens before the turn's `new_tokens`.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Turn:
    """One model call of a session; tokens and seconds."""

    new_tokens: int
    output_len: int
    pause_after_s: float = 0.0
    pause_kind: str = ""  # the tool class, "human", "join" or "" after the last turn
    compact_to: int | None = None
    children: list["Session"] = field(default_factory=list)  # spawned when this turn has ended


@dataclass(slots=True)
class Session:
    """One conversation or task; a child's `arrival_s` counts from the end of the spawning turn."""

    key: int
    arrival_s: float
    turns: list[Turn]
    prefix_id: int = 0
    shared_prefix_tokens: int = 0
    path: tuple[tuple[int, int], ...] = ()  # trace only: (extent, tokens at its end) of turn 0

    def input_len(self, turn: int) -> int:
        """Prompt tokens of a turn under the context rule.

        >>> Session(0, 0.0, [Turn(100, 20), Turn(30, 20)], shared_prefix_tokens=1000).input_len(1)
        1150
        """
        own = 0
        for earlier in self.turns[:turn]:
            own = own if earlier.compact_to is None else earlier.compact_to
            own += earlier.new_tokens + earlier.output_len
        last = self.turns[turn]
        own = own if last.compact_to is None else last.compact_to
        return self.shared_prefix_tokens + own + last.new_tokens
