"""KV blocks and the prefix cache: runs of blocks (extents), the least recently used evicted first.

An extent is a chain of blocks that is always reached from its first one: a shared system prompt,
a session's own context, a run of trace hashes. A prompt is a path of extents, each with the block
count at which it ends. Only how many leading blocks of an extent are cached has to be kept, so a
turn costs one look-up per extent, not one per block, with the result of per-block LRU.
"""

from collections import OrderedDict
from collections.abc import Iterable

Path = tuple[tuple[int, int], ...]
OPEN_END = 1 << 60  # the end of an extent that grows with its session
NOTHING = [0, 0]  # an extent without cached blocks or pins


class BlockPool:
    """KV blocks of one engine: total = free + private + cached, in blocks.

    >>> pool = BlockPool(10)
    >>> pool.pin(path := ((7, 4),)); pool.take(5); pool.share(path, 4)
    4
    >>> pool.unpin(path); pool.free += 1
    >>> pool.match(path), pool.free, pool.evictable
    (4, 6, 4)
    >>> pool.take(8); pool.match(path)
    2
    """

    __slots__ = ("_extents", "_lru", "evictable", "free", "total")

    def __init__(self, total_blocks: int) -> None:
        self.total = self.free = total_blocks
        self.evictable = 0  # cached blocks that no running request uses
        self._extents: dict[int, list[int]] = {}  # extent -> [cached blocks, pins]
        self._lru: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that a request can have: free ones and cached ones that nobody uses."""
        return self.free + self.evictable

    @property
    def used(self) -> int:
        """Blocks held by running requests, shared ones once."""
        return self.total - self.free - self.evictable

    def match(self, path: Path) -> int:
        """Leading blocks of the path that are cached."""
        start = 0
        for key, end in path:
            cached, _ = self._extents.get(key, NOTHING)
            if cached < end - start:
                return start + cached
            start = end
        return start

    def pin_cost(self, path: Path) -> int:
        """Blocks that pinning the path takes out of `available`."""
        return sum(self._extents[key][0] for key, _ in path if key in self._lru)

    def pin(self, path: Path) -> None:
        """Protect the path's extents from eviction until `unpin`."""
        for key, _ in path:
            extent = self._extents.setdefault(key, [0, 0])
            if key in self._lru:
                del self._lru[key]
                self.evictable -= extent[0]
            extent[1] += 1

    def unpin(self, path: Path) -> None:
        """Give the path back to the cache as most recently used, its tail first to go."""
        for key, _ in reversed(path):
            extent = self._extents[key]
            extent[1] -= 1
            if extent == NOTHING:
                del self._extents[key]
            elif extent[1] == 0:
                self._lru[key] = None
                self.evictable += extent[0]

    def share(self, path: Path, upto: int) -> int:
        """Blocks that turn from private to cached once the first `upto` of a pinned path exist."""
        start = moved = 0
        for key, end in path:
            if upto <= start:
                break
            extent = self._extents[key]
            more = min(upto, end) - start - extent[0]
            if more > 0:
                extent[0] += more
                moved += more
            start = end
        return moved

    def take(self, blocks: int) -> None:
        """Make `blocks` private (the caller has checked `available`), evicting what is needed."""
        self.free -= blocks
        while self.free < 0:
            self._remove(next(iter(self._lru)), -self.free)

    def store(self, path: Path) -> int:
        """Cache the whole path as if it had been computed; returns the blocks already there."""
        found = self.match(path)
        self.pin(path)
        more = min(path[-1][1] - found, self.available)
        self.take(more)
        self.share(path, found + more)
        self.unpin(path)
        return found

    def drop(self, path: Path) -> None:
        """Forget the unpinned extents of a path: its KV is lost."""
        for key, _ in path:
            if key in self._lru:
                self._remove(key, self._extents[key][0])

    def _remove(self, key: int, blocks: int) -> None:
        extent = self._extents[key]
        removed = min(blocks, extent[0])
        extent[0] -= removed
        self.evictable -= removed
        self.free += removed
        if extent[0] == 0:
            del self._lru[key], self._extents[key]


def lru_hit_fraction(paths: Iterable[Path], capacity_blocks: int) -> float:
    """Blocks found by prompts one after another in an LRU prefix cache, as a fraction of all.

    >>> a, b = ((1, 2),), ((2, 2),)
    >>> lru_hit_fraction([a, b, a], 4), lru_hit_fraction([a, b, a], 3)
    (0.3333333333333333, 0.16666666666666666)
    """
    pool = BlockPool(capacity_blocks)
    hits = asked = 0
    for path in paths:
        asked += path[-1][1]
        hits += pool.store(path)
    return hits / asked
