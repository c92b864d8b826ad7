"""Metric names in a dashboard or alert file that this engine version does not print."""

import re

from kit.engine_config import engine_data, version_tuple

_ENDINGS = re.compile(r"_(total|bucket|sum|count|created)$")


def lint_metrics(text: str, engine: str, version: str | None = None) -> list[str]:
    """One line per name that is gone or was never known; empty when all is well.

    >>> lint_metrics("max(vllm:gpu_cache_usage_perc) > 0.9", "vllm", "0.32.0")
    ['vllm:gpu_cache_usage_perc: not printed since vLLM 0.11.0; use vllm:kv_cache_usage_perc']
    >>> lint_metrics("max(vllm:gpu_cache_usage_perc) > 0.9", "vllm", "0.10.2")
    []
    """
    data = engine_data(engine)
    table, version = data["metrics"], version or str(data["newest"])
    known = set(table["known"].split())
    found = []
    for name in sorted(set(re.findall(rf"\b{table['prefix']}[A-Za-z0-9_]+", text))):
        stem = next((n for n in (name, _ENDINGS.sub("", name)) if n in table["removed"]), None)
        gone = table["removed"].get(stem)
        if gone and version_tuple(version) >= version_tuple(str(gone["since"])):
            use = f"; use {gone['instead']}" if gone["instead"] else ""
            found.append(f"{name}: not printed since {data['name']} {gone['since']}{use}")
        elif not gone and not {part.removeprefix(table["prefix"]) for part in (name, _ENDINGS.sub("", name))} & known:
            found.append(f"{name}: {data['name']} prints no such metric")
    return found
