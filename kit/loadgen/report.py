"""A summary as a few lines of text, and the same load as other tools' command lines."""

import shlex
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.loadgen.plan import Level, Target
from kit.units import format_seconds

LATENCIES = ("ttft_s", "ttft_scheduled_s", "ttft_answer_s", "tpot_s", "itl_s", "e2el_s")


def equivalents(target: Target, level: Level, input_len: int, output_len: int, burstiness: float) -> dict[str, str]:
    """Commands of aiperf, guidellm and vllm bench serve, from data/load_tools.yaml."""
    values: dict[str, Any] = {"n": len(level.sessions), "value": level.value}
    values |= {"input_len": input_len, "output_len": output_len, "shape": burstiness**-2}
    root = target.base_url.rstrip("/").removesuffix("/v1")
    values |= {"root": shlex.quote(root), "model": shlex.quote(target.model)}
    tools = load_yaml(DATA / "load_tools.yaml")
    return {name: f"{words['base']} {words[level.kind]}".format(**values).strip() for name, words in tools.items()}


def text(summary: dict[str, Any]) -> str:
    """The summary of one level for people."""
    lines = [f"{summary['level']}: {summary['verdict']}", *summary["verdict_reasons"]]
    counts = (f"{name} {summary[name]}" for name in ("sent", "completed", "failed"))
    lines.append(f"{', '.join(counts)} {summary['failures'] or ''}".rstrip())
    for name in LATENCIES:
        cells = [f"{q} {_cell(summary[name][q])}" for q in ("mean", "p50", "p90", "p95", "p99")]
        lines.append(f"{name:<17} " + "  ".join(cells))
    if summary["slo_attainment_fraction"] is not None:
        low, high = summary["slo_attainment_interval"]
        share = summary["slo_attainment_fraction"]
        lines.append(f"attainment {share:.3f} (95 %: {low:.3f} to {high:.3f})")
    elif summary["slo_met"] is False:
        share = summary["slo_attainment_not_valid"]
        lines.append(f"attainment not valid, the client was the limit (counted: {share:.3f})")
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    lines += [f"same with {tool}: {line}" for tool, line in summary.get("equivalents", {}).items()]
    return "\n  ".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)
