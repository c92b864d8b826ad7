"""Prompts as tokens of four bytes and paths of extents; answers as words, JSON of a schema, or calls of tools."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import count
from math import ceil
from operator import getitem
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.catalog.paths import DATA, load_yaml
from kit.scheduler import Path

Body = dict[str, Any]
Answer = str | list[Body]  # text, or tool calls
TOKEN_BYTES = 4
MOST_NODES = 1 << 17
NATURAL_TOKENS = 32, 256  # shortest and longest answer that is not told how long to be
DEEP = 4  # below this only what a schema requires
_DATA, _rng = load_yaml(DATA / "emulator.yaml"), random.Random(0)
TOKENS = "".join(f" {_rng.choice(_DATA['words'].split())}" for _ in range(1 << 15))  # every word is one token


def prompt_bytes(body: Body) -> bytes:
    """The prompt as the model reads it, a whole number of tokens per message, each with four tokens of header."""
    if (prompt := body.get("prompt")) is not None:
        return np.array(prompt, "<u4").tobytes() if isinstance(prompt, list) else _padded(prompt)
    parts = [_padded(json.dumps(body["tools"]))] if body.get("tools") else []
    for message in body["messages"]:
        content, calls = message.get("content") or "", message.get("tool_calls")
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        parts += [_header(message["role"]), _padded(content + (json.dumps(calls) if calls else ""))]
    return b"".join([*parts, _header("assistant")])


def _header(role: str) -> bytes:
    return b"<%-14b>" % role.encode()[:14]


def _padded(text: str) -> bytes:
    data = text.encode(errors="replace")
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


@dataclass(slots=True)
class Node:
    """A run of block hashes, which is an extent of the scheduler's pool, and what branches off it."""

    key: int
    hashes: NDArray[np.uint64]
    children: "dict[tuple[int, int], Node]"  # by (blocks of this node before the branch, first hash)


class PrefixTree:
    """Contents seen so far, at the grain of KV blocks; a context that grows keeps its extent.

    >>> tree = PrefixTree(block_size=1)
    >>> tree.path(b"sys.ask1"), tree.path(b"sys.ask1ans1ask2"), tree.path(b"sys.ask3")
    (((1, 2),), ((1, 4),), ((1, 1), (2, 2)))
    """

    def __init__(self, block_size: int) -> None:
        self.block_size, self.root, self.numbers = block_size, Node(0, np.empty(0, np.uint64), {}), count(1)
        self.weights = np.random.default_rng(0).integers(1, 1 << 63, block_size, np.uint64) * 2 + 1

    def path(self, text: bytes) -> Path:
        """Extents of the full blocks of a text, what is known first."""
        size, node, path, start, same = self.block_size, self.root, [], 0, 0
        ids = np.frombuffer(text, "<u4", len(text) // (TOKEN_BYTES * size) * size).astype(np.uint64)
        hashes = (ids.reshape(-1, size) * self.weights).sum(axis=1, dtype=np.uint64)
        while start < len(hashes):
            rest, branch = hashes[start:], (same, int(hashes[start]))
            if branch not in node.children:
                node.children[branch] = Node(next(self.numbers), rest, {})
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


def parts(answer: Answer) -> Iterator[Body]:
    """What each token of an answer adds to a message: a bit of text, or of a tool call."""
    if isinstance(answer, str):
        yield from ({"content": answer[at : at + TOKEN_BYTES]} for at in range(0, len(answer), TOKEN_BYTES))
        return
    for index, call in enumerate(answer):
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        for part in parts(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part["content"]}}]}


def plan(body: Body, seed: int, limit: int) -> tuple[Answer, int, str]:
    """The answer, its tokens and why it ends."""
    if limit < 1:
        raise ValueError(f"max_tokens must be at least 1, got {limit}")
    answer = scripted(body, seed)
    tokens = sum(1 for _ in parts(answer or ""))
    if isinstance(answer, list) and tokens <= limit:
        return answer, tokens, "tool_calls"
    if not isinstance(answer, str):
        low, high = NATURAL_TOKENS
        natural = max(body.get("min_tokens") or 0, low + seed % (high - low + 1))
        tokens = limit + 1 if body.get("ignore_eos") else natural
        answer = words(min(tokens, limit), seed)
    return answer[: limit * TOKEN_BYTES], min(tokens, limit), "stop" if tokens <= limit else "length"


def scripted(body: Body, seed: int) -> Answer | None:
    """Tool calls or JSON where the request asks for them; None for plain words.

    Tools are called until the conversation holds a result of one; forced calls always are.
    """
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    forced, seen = choice not in ("auto", "none"), any(one.get("role") == "tool" for one in body.get("messages", []))
    if tools and choice != "none" and (forced or not seen):
        name = choice["function"]["name"] if isinstance(choice, dict) else None
        offered = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
        if not offered:
            raise ValueError(f"tool_choice {name!r} is not among the tools")
        chosen = offered[: 4 if body.get("parallel_tool_calls") else 1]
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
    root, deep = schema if root is None else root, depth > DEEP
    schema = _flat(schema, root, deep)
    if fixed := [schema["const"]] if "const" in schema else schema.get("enum"):
        return fixed[0]
    kind = schema.get("type") or ("object" if "properties" in schema else "array" if "items" in schema else "string")
    kind = next((one for one in kind if one != "null"), "null") if isinstance(kind, list) else kind
    if kind == "object":
        fields = schema.get("properties", {})
        kept = schema.get("required", []) if deep else fields
        return {name: example(part, root, depth + 1) for name, part in fields.items() if name in kept}
    if kind == "array":
        first = schema.get("prefixItems", [])
        size = max(schema.get("minItems", 0), min(schema.get("maxItems", 1), int(not deep)), len(first))
        return [example(part, root, depth + 1) for part in (first + [schema.get("items", True)] * size)[:size]]
    if kind == "string":
        text = _DATA["formats"].get(schema.get("format"), "text").ljust(schema.get("minLength", 0), "x")
        return text[: schema.get("maxLength")]
    return _number(schema, kind) if kind in ("integer", "number") else True if kind == "boolean" else None


def _flat(given: Any, root: Any, deep: bool) -> Body:
    """The schema joined with what it refers to, all of its allOf and one of its alternatives: no null, unless deep."""
    schema: Body = given if isinstance(given, dict) else {"type": "object"}  # true accepts anything
    options = sorted(schema.get("anyOf") or schema.get("oneOf") or [], key=lambda one: one.get("type") == "null")
    joined = [*schema.get("allOf", []), *(options[-1:] if deep else options[:1])]
    if "$ref" in schema:
        keys = (key.replace("~1", "/").replace("~0", "~") for key in schema["$ref"].split("/")[1:])
        joined.append(reduce(getitem, keys, root))
    for part in (_flat(part, root, deep) for part in joined):
        fields = part.get("properties", {}) | schema.get("properties", {})
        required = [*part.get("required", []), *schema.get("required", [])]
        schema = part | schema | ({"properties": fields, "required": required} if fields else {})
    return schema


def _number(schema: Body, kind: str) -> float:
    step, high = schema.get("multipleOf", 1), schema.get("maximum", schema.get("exclusiveMaximum", float("inf")))
    low = schema.get("minimum", min(1, high - step))
    if (above := schema.get("exclusiveMinimum")) is not None:
        low = above + min(step, (high - above) / 2)
    value = ceil(low / step) * step if kind == "integer" or "multipleOf" in schema else low
    return int(value) if kind == "integer" else value
