"""Prompts as tokens of four bytes and paths of extents; answers as words, JSON of a schema, or calls of tools."""

import json
import random
from itertools import count
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.scheduler import Path

TOKEN_BYTES = 4
MOST_NODES = 1 << 17
_rng = random.Random(0)
_WORDS = "the and for are but not you all any can had her was one our out day get has him his how man new now old see"
TOKENS = "".join(f" {_rng.choice(_WORDS.split())}" for _ in range(1 << 15))  # every word is one token
FORMATS = {
    "date": "2026-01-31", "time": "12:00:00Z", "date-time": "2026-01-31T12:00:00Z", "email": "a@example.com",
    "uri": "https://example.com/", "uuid": "00000000-0000-4000-8000-000000000000", "ipv4": "192.0.2.1",
}  # fmt: skip
DEEP = 4  # below this only what a schema requires


def prompt_bytes(body: dict[str, Any]) -> bytes:
    """The prompt as the model reads it, a whole number of tokens per message, each with four tokens of header."""
    if (prompt := body.get("prompt")) is not None:
        ids = isinstance(prompt, list)
        return np.array(prompt, "<u4").tobytes() if ids else _padded(prompt)
    parts = [_padded(json.dumps(body["tools"]))] if body.get("tools") else []
    for message in body["messages"]:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        called = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        parts += [b"<%-14b>" % message["role"].encode()[:14], _padded(content + called)]
    return b"".join([*parts, b"<%-14b>" % b"assistant"])


def _padded(text: str) -> bytes:
    data = text.encode(errors="replace")
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


class Node:
    """A run of block hashes, which is an extent of the scheduler's pool, and what branches off it."""

    __slots__ = ("children", "hashes", "key")

    def __init__(self, key: int, hashes: NDArray[np.uint64]) -> None:
        self.key, self.hashes = key, hashes
        self.children: dict[tuple[int, int], Node] = {}  # by (blocks of this node before the branch, first hash)


class PrefixTree:
    """Contents seen so far, at the grain of KV blocks; a context that grows keeps its extent.

    >>> tree = PrefixTree(block_size=1)
    >>> tree.path(b"sys.ask1"), tree.path(b"sys.ask1ans1ask2"), tree.path(b"sys.ask3")
    (((1, 2),), ((1, 4),), ((1, 1), (2, 2)))
    """

    def __init__(self, block_size: int) -> None:
        self.block_size, self.root, self.numbers = block_size, Node(0, np.empty(0, np.uint64)), count(1)
        self.weights = np.random.default_rng(0).integers(1, 1 << 63, block_size, np.uint64) * 2 + 1

    def path(self, text: bytes) -> Path:
        """Extents of the full blocks of a text, what is known first."""
        size, node, path, start, same = self.block_size, self.root, [], 0, 0
        ids = np.frombuffer(text, "<u4", len(text) // (TOKEN_BYTES * size) * size).astype(np.uint64)
        hashes = ids if size == 1 else (ids.reshape(-1, size) * self.weights).sum(axis=1, dtype=np.uint64)
        while start < len(hashes):
            rest, branch = hashes[start:], (same, int(hashes[start]))
            if branch not in node.children:
                node.children[branch] = Node(next(self.numbers), rest)
            node = node.children[branch]
            shared = min(len(rest), len(node.hashes))
            differ = np.flatnonzero(node.hashes[:shared] != rest[:shared])
            same = int(differ[0]) if len(differ) else shared
            if same == len(node.hashes) < len(rest) and (same, int(rest[same])) not in node.children:
                node.hashes, same = rest, len(rest)
            start += same
            path.append((node.key, start))
        if node.key % MOST_NODES == MOST_NODES - 1:
            self.root.children.clear()  # memory stays bounded; the cache is cold once
        return tuple(path)


def words(tokens: int, seed: int) -> str:
    """That many tokens of text."""
    start, length = seed % len(TOKENS) // TOKEN_BYTES * TOKEN_BYTES, tokens * TOKEN_BYTES
    return (TOKENS[start : start + length] + TOKENS * (length // len(TOKENS) + 1))[:length]


def scripted(body: dict[str, Any], seed: int) -> str | list[dict[str, Any]] | None:
    """Tool calls or JSON where the request asks for them; None for plain words.

    Tools are called until the conversation holds a result of one; forced calls always are.
    """
    tools, choice = body.get("tools") or [], body.get("tool_choice", "auto")
    forced, seen = choice not in ("auto", "none"), any(one.get("role") == "tool" for one in body.get("messages", []))
    if tools and choice != "none" and (forced or not seen):
        if isinstance(choice, dict):
            tools = [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
        if not tools:
            raise ValueError(f"tool_choice {choice['function']['name']!r} is not among the tools")
        chosen = [tool["function"] for tool in tools[: 4 if body.get("parallel_tool_calls") else 1]]
        named = [{"name": one["name"], "arguments": json.dumps(example(one.get("parameters", True)))} for one in chosen]
        return [{"id": f"call_{seed:08x}{i}", "type": "function", "function": one} for i, one in enumerate(named)]
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(example(wanted["json_schema"].get("schema", True)))
    return json.dumps({"answer": words(8, 0)}) if wanted.get("type") == "json_object" else None


def example(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A value that the schema accepts; `pattern`, `not`, `if` and uniqueItems are not looked at.

    >>> example({"properties": {"n": {"type": "integer", "minimum": 3}, "s": {"enum": ["a", "b"]}}})
    {'n': 3, 's': 'a'}
    """
    root = schema if root is None else root
    schema = _resolved(schema, root)
    for part in schema.get("allOf", []):
        part = _resolved(part, root)
        fields = {**part.get("properties", {}), **schema.get("properties", {})}
        required = [*part.get("required", []), *schema.get("required", [])]
        schema = {**part, **schema, **({"properties": fields, "required": required} if fields else {})}
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        by_weight = sorted(options, key=lambda option: option.get("type") == "null")
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
        return example({**rest, **_resolved(by_weight[-1 if depth > DEEP else 0], root)}, root, depth + 1)
    return _typed(schema, root, depth)


def _resolved(schema: Any, root: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, dict) else {"type": "object"}  # true accepts anything
    while "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part.replace("~1", "/").replace("~0", "~")]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return dict(schema)


def _typed(schema: dict[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type") or ("object" if "properties" in schema else "array" if "items" in schema else "string")
    kind = next((one for one in kind if one != "null"), "null") if isinstance(kind, list) else kind
    if kind == "object":
        fields = schema.get("properties", {})
        kept = schema.get("required", []) if depth > DEEP else fields
        return {name: example(part, root, depth + 1) for name, part in fields.items() if name in kept}
    if kind == "array":
        first = schema.get("prefixItems", [])
        size = max(schema.get("minItems", 0), min(schema.get("maxItems", 1), int(depth <= DEEP)), len(first))
        return [example(part, root, depth + 1) for part in (first + [schema.get("items", True)] * size)[:size]]
    if kind == "string":
        text = FORMATS.get(schema.get("format", ""), "text").ljust(schema.get("minLength", 0), "x")
        return text[: schema.get("maxLength", len(text))]
    return _number(schema, kind) if kind in ("integer", "number") else True if kind == "boolean" else None


def _number(schema: dict[str, Any], kind: str) -> float:
    step, high = schema.get("multipleOf", 1), schema.get("maximum", schema.get("exclusiveMaximum", float("inf")))
    whole, low = kind == "integer" or "multipleOf" in schema, schema.get("minimum", 1 if high > 1 else high - step)
    if (above := schema.get("exclusiveMinimum")) is not None:
        low = above + (step if whole or high > above + 2 * step else (high - above) / 2)
    value = ceil(low / step) * step if whole else low
    return int(value) if kind == "integer" else value
