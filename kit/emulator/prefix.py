"""Prompts as tokens of four bytes, and a tree of them that gives the scheduler its paths of extents."""

import json
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.scheduler import BlockPool, Path

TOKEN_BYTES = 4
VOCABULARY = 128_000
NODES_KEPT = 1 << 16
Children = dict[tuple[int, int], "Node"]


def padded(text: bytes) -> bytes:
    """The text up to a whole number of tokens."""
    return text + b"\0" * (-len(text) % TOKEN_BYTES)


def token_ids(text: bytes) -> list[int]:
    """Ids of the text's tokens.

    >>> len(token_ids(b"twelve bytes")), len(token_ids(b"and thirteen."))
    (3, 4)
    """
    return (np.frombuffer(padded(text), "<u4") % VOCABULARY).tolist()


def chat_text(messages: list[dict[str, Any]], tools: Any = None) -> bytes:
    """The conversation as the model reads it: four tokens of header before each message and the answer."""
    parts = [padded(json.dumps(tools).encode())] if tools else []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        called = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        parts += [b"<%-14b>" % message["role"].encode()[:14], padded((content + called).encode(errors="replace"))]
    return b"".join([*parts, b"<%-14b>" % b"assistant"])


class Node:
    """A run of block hashes that is an extent of the scheduler's pool, and what branches off it."""

    __slots__ = ("children", "hashes", "key")

    def __init__(self, key: int, hashes: NDArray[np.uint64]) -> None:
        self.key, self.hashes = key, hashes
        self.children: Children = {}  # by (blocks of this node before the branch, first hash)


class PrefixTree:
    """Contents seen so far, at the grain of KV blocks; a context that grows keeps its extent.

    >>> tree = PrefixTree(block_size=1)
    >>> tree.path(b"sys.ask1"), tree.path(b"sys.ask1ans1ask2"), tree.path(b"sys.ask3")
    (((1, 2),), ((1, 4),), ((1, 1), (2, 2)))
    """

    def __init__(self, block_size: int) -> None:
        self.block_size, self.children, self.numbers = block_size, Children(), count(1)
        self.nodes = 0
        self._weights = np.random.default_rng(0).integers(1, 1 << 63, block_size, np.uint64) * 2 + 1

    def path(self, text: bytes) -> Path:
        """Extents of the full blocks of a text, what is known first."""
        size = self.block_size
        ids = np.frombuffer(text, "<u4", len(text) // (TOKEN_BYTES * size) * size).astype(np.uint64)
        hashes = ids if size == 1 else (ids.reshape(-1, size) * self._weights).sum(axis=1, dtype=np.uint64)
        path, start, same, children = [], 0, 0, self.children
        while start < len(hashes):
            rest = hashes[start:]
            node = children.get((same, int(rest[0])))
            if node is None:
                self.nodes += 1
                node = children[same, int(rest[0])] = Node(next(self.numbers), rest)
            shared = min(len(rest), len(node.hashes))
            differ = np.flatnonzero(node.hashes[:shared] != rest[:shared])
            same = int(differ[0]) if len(differ) else shared
            if same == len(node.hashes) < len(rest) and (same, int(rest[same])) not in node.children:
                node.hashes, same = rest, len(rest)
            start += same
            path.append((node.key, start))
            children = node.children
        return tuple(path)

    def forget(self, pool: BlockPool, children: Children | None = None) -> None:
        """Drop leaves of which nothing is cached any more, once there are many nodes."""
        if children is None and self.nodes < NODES_KEPT:
            return
        children = self.children if children is None else children
        for key, node in list(children.items()):
            self.forget(pool, node.children)
            if not node.children and not pool.match(((node.key, 1),)):
                del children[key]
                self.nodes -= 1
