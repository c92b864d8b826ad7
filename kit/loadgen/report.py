"""A summary as a few lines of text."""

from typing import Any

from kit.units import format_seconds

LATENCIES = ("ttft_s", "ttft_scheduled_s", "ttft_answer_s", "tpot_s", "itl_s", "e2el_s")


def text(summary: dict[str, Any]) -> str:
    """The summary of one level for people."""
    lines = [f"{summary['level']}: {summary['verdict']}"]
    lines += [f"  {reason}" for reason in summary["verdict_reasons"]]
    lines.append(
        f"  sent {summary['sent']}, completed {summary['completed']}, failed {summary['failed']} "
        f"{summary['failures'] or ''}, peak in flight {summary['peak_in_flight']}"
    )
    for name in LATENCIES:
        cells = [f"{q} {_cell(summary[name][q])}" for q in ("mean", "p50", "p90", "p95", "p99")]
        lines.append(f"  {name:<17} " + "  ".join(cells))
    if summary["slo_attainment_fraction"] is not None:
        low, high = summary["slo_attainment_interval"]
        share = f"{summary['slo_attainment_fraction']:.3f} (95 %: {low:.3f} to {high:.3f})"
        believed = "" if summary["verdict"] == "VALID" else ", not valid: the client was the limit"
        lines.append(f"  attainment {share}{believed}")
    lines += [f"  warning: {warning}" for warning in summary["warnings"]]
    lines += [
        f"  same with {tool}: {line}" for tool, line in summary.get("equivalents", {}).items()
    ]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)
