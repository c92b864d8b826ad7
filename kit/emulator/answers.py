"""What the emulated model says: words, a value that fits a JSON schema, or calls of the tools it was given."""

import json
import random
from math import ceil
from typing import Any

from kit.emulator.prefix import TOKEN_BYTES

_WORDS = "the and for are but not you all any can had her was one our out day get has him his how man new now old see"
_rng = random.Random(0)
TOKENS = "".join(f" {_rng.choice(_WORDS.split())}" for _ in range(1 << 15))  # every word is one token
FORMATS = {
    "date": "2026-01-31", "time": "12:00:00Z", "date-time": "2026-01-31T12:00:00Z", "email": "a@example.com",
    "uri": "https://example.com/", "uuid": "00000000-0000-4000-8000-000000000000", "ipv4": "192.0.2.1",
}  # fmt: skip
DEEP = 4  # below this only what a schema requires


def words(tokens: int, seed: int) -> str:
    """That many tokens of text."""
    start = seed % (len(TOKENS) // TOKEN_BYTES) * TOKEN_BYTES
    length = tokens * TOKEN_BYTES
    return (TOKENS[start : start + length] + TOKENS * (length // len(TOKENS) + 1))[:length]


def scripted(body: dict[str, Any], seed: int) -> str | list[dict[str, Any]] | None:
    """Tool calls or JSON where the request asks for them; None for plain words.

    Tools are called until the conversation holds a result of one; forced calls always are.
    """
    tools, choice = body.get("tools") or [], body.get("tool_choice", "auto")
    forced = choice == "required" or isinstance(choice, dict)
    seen = any(message.get("role") == "tool" for message in body.get("messages", []))
    if tools and choice != "none" and (forced or not seen):
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
        tools = tools[: 4 if body.get("parallel_tool_calls") else 1]
        return [_call(16 * seed + i, tool["function"]) for i, tool in enumerate(tools)]
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(example(wanted["json_schema"].get("schema", {})))
    return json.dumps({"answer": words(8, 0)}) if wanted.get("type") == "json_object" else None


def _call(number: int, function: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(example(function.get("parameters") or {"type": "object"}))
    named = {"name": function["name"], "arguments": arguments}
    return {"id": f"call_{number:010x}", "type": "function", "function": named}


def example(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A value that the schema accepts; `pattern`, `not`, `if` and uniqueItems are not looked at.

    >>> example({"properties": {"n": {"type": "integer", "minimum": 3}, "s": {"enum": ["a", "b"]}}})
    {'n': 3, 's': 'a'}
    """
    root = schema if root is None else root
    schema = _resolved(schema, root)
    for part in schema.get("allOf", []):
        part = _resolved(part, root)
        both = {key: {**part.get(key, {}), **schema.get(key, {})} for key in ("properties",)}
        schema = {**part, **schema, **both, "required": [*part.get("required", []), *schema.get("required", [])]}
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        empty = [option for option in options if option.get("type") == "null"]
        chosen = empty[0] if empty and depth > DEEP else next((o for o in options if o not in empty), options[0])
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
        return example({**rest, **_resolved(chosen, root)}, root, depth + 1)
    return _typed(schema, root, depth)


def _resolved(schema: Any, root: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):  # true accepts anything
        return {"type": "object"}
    while "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part.replace("~1", "/").replace("~0", "~")]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _typed(schema: dict[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type") or ("object" if "properties" in schema else "array" if "items" in schema else "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind == "object":
        kept = set(schema.get("required", [])) if depth > DEEP else schema.get("properties", {})
        fields = schema.get("properties", {}).items()
        return {name: example(part, root, depth + 1) for name, part in fields if name in kept}
    if kind == "array":
        first = schema.get("prefixItems", [])
        size = max(schema.get("minItems", 0), min(schema.get("maxItems", 1), 0 if depth > DEEP else 1), len(first))
        return [example((first + [schema.get("items", {})] * size)[i], root, depth + 1) for i in range(size)]
    if kind == "string":
        text = FORMATS.get(schema.get("format", ""), "text").ljust(schema.get("minLength", 0), "x")
        return text[: schema.get("maxLength", len(text))]
    return _number(schema, kind) if kind in ("integer", "number") else True if kind == "boolean" else None


def _number(schema: dict[str, Any], kind: str) -> float:
    step = schema.get("multipleOf", 1)
    low, high = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum"))
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"]
        low += step if high is None or kind == "integer" or "multipleOf" in schema else (high - low) / 2
    if low is None:
        low = 1 if high is None or high > 1 else high - step
    value = ceil(low / step) * step if kind == "integer" or "multipleOf" in schema else low
    return int(value) if kind == "integer" else value
