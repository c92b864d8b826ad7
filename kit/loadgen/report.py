"""A summary as a few lines of text, and the same load as other tools' command lines."""

import shlex
from typing import Any

from kit.catalog.paths import DATA, load_yaml
from kit.loadgen.plan import Level, Target
from kit.units import format_seconds

LATENCIES = ("ttft_s", "ttft_scheduled_s", "ttft_answer_s", "tpot_s", "itl_s", "e2el_s")
PLAIN = ("failures", "output_tokens_per_s", "goodput_requests_per_s", "slo_attainment_fraction")


def equivalents(target: Target, level: Level, input_len: int, output_len: int, burstiness: float) -> dict[str, str]:
    """Commands of aiperf, guidellm and vllm bench serve, from data/load_tools.yaml."""
    values = {
        "n": len(level.sessions), "value": level.value, "input_len": input_len, "output_len": output_len,
        "shape": burstiness**-2, "root": shlex.quote(target.root), "model": shlex.quote(target.model),
    }  # fmt: skip
    tools = load_yaml(DATA / "load_tools.yaml")
    return {name: f"{words['base']} {words[level.kind]}".format(**values).strip() for name, words in tools.items()}


def text(summary: dict[str, Any]) -> str:
    """The summary of one level for people."""
    lines = [f"{summary['level']}: {summary['verdict']}", *summary["verdict_reasons"]]
    lines.append(", ".join(f"{name} {summary[name]}" for name in ("sent", "completed", "failed")))
    for name in LATENCIES:
        cells = ((q, summary[name][q]) for q in ("mean", "p50", "p90", "p95", "p99"))
        lines.append(f"{name:<17}" + "".join(f" {q} {'-' if x is None else format_seconds(x)} " for q, x in cells))
    lines += [f"{name} {summary[name]}" for name in PLAIN if summary[name]]
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    lines += [f"same with {tool}: {line}" for tool, line in summary.get("equivalents", {}).items()]
    return "\n  ".join(lines) + "\n"
