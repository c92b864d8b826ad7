"""Which session a call belongs to: told by a header, else by the messages that it repeats."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import count

Key = tuple[str, bytes]


class Sessions:
    """Names sessions. A call that repeats all messages of an earlier one, and more, is that session's next turn.

    >>> calls = Sessions()
    >>> [calls.identify("", "", chain)[0] for chain in ([b"a"], [b"a", b"ab"], [b"a", b"ab"])]
    ['s1', 's1', 's2']
    >>> [calls.identify("x", "", chain) for chain in ([b"a"], [b"c"], [b"c", b"cd"])]
    [('x', ''), ('x/1', 'x'), ('x/1', 'x')]
    """

    def __init__(self) -> None:
        self.last: defaultdict[Key, list[str]] = defaultdict(list)  # sessions by the chain of their latest call
        self.numbers = count(1)
        self.families: defaultdict[str, count[int]] = defaultdict(count)

    def identify(self, told: str, parent: str, hashes: Sequence[bytes]) -> tuple[str, str]:
        """Session and parent of a call, given its headers ("" without) and the chain of its messages.

        Calls under one header that do not go on from each other are sub-agents of the first.
        """
        name = self._going_on(told, hashes)
        if not name:
            index = next(self.families[told]) if told else next(self.numbers)
            name = f"s{index}" if not told else f"{told}/{index}" if index else told
        if hashes:
            self.last[told, hashes[-1]].append(name)
        return name, told if told and name != told else parent

    def _going_on(self, told: str, hashes: Sequence[bytes]) -> str:
        """The session whose latest call is the longest beginning of this one, its place given up; "" for none."""
        for digest in reversed(hashes[:-1]):
            if names := self.last.get((told, digest)):
                name = names.pop(0)
                if not names:
                    del self.last[told, digest]
                return name
        return ""
