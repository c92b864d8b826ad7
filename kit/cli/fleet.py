"""kit fleet: what a scenario's traffic costs under each policy, and which of them meet the SLO."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kit.cli import options

FIGURES = {
    "usd_per_month": "USD/month", "usd_per_1k_conversations": "per 1k conv.", "usd_per_million_tokens": "per M tokens",
    "slo_attainment_fraction": "within SLO", "interruptions": "killed", "lost_turns": "lost", "idle_fraction": "idle",
}  # fmt: skip


def command(
    scenario: Annotated[str, typer.Option(help="key of data/scenarios, or a YAML file")],
    policies: Annotated[str, typer.Option(help="all, or some of data/fleet.yaml with commas between")] = "all",
    days: Annotated[
        float, typer.Option(help="up to one day every turn is simulated; more days go by the minute")
    ] = 30.0,
    seed: int = 0,
    refresh_prices: Annotated[str | None, typer.Option(help="add the offers at this address to the price book")] = None,
    json_output: options.Json = False,
) -> None:
    """Runs fleet policies on a scenario's traffic and prices them."""
    from kit import prices
    from kit.fleet import Study, compare
    from kit.scenario import load

    if refresh_prices:
        prices.refresh(base_url=refresh_prices)
    result = compare(Study(load(Path(scenario) if Path(scenario).is_file() else scenario), days, seed), policies)
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n" if json_output else _text(result))


def _text(result: dict[str, Any]) -> str:
    """The policies with what they rest on; every line says modelled or quoted."""
    head = f"{result['conversations']:,} conversations in {result['days']:g} days on {result['gpu']}, modelled:"
    lines = [head, f"{'policy':<24}" + "".join(f"{text:>13}" for text in FIGURES.values())]
    quotes: dict[str, Any] = {}
    for name, row in sorted(result["policies"].items(), key=lambda one: one[1]["usd_per_month"]):
        for label, figures in (
            (name, row),
            *((f"  {other} model", one) for other, one in row["other_interruptions"].items()),
        ):
            lines.append(f"{label:<24}" + "".join(f"{_number(figures[key]):>13}" for key in FIGURES))
        quotes |= {json.dumps(price): price for price in row["prices"]}
        for check in row["checks"]:
            usd, reached = check["usd_difference_fraction"], check["attainment_difference"]
            lines.append(
                f"  minutes against turns, day {check['day']}: cost {usd:+.1%}, attainment {reached * 100:+.1f} points"
            )
        if row.get("lead_outlasts_burst"):
            low, high = row["lead_time_s"]
            lines.append(
                f"  a new replica takes {low:.0f} to {high:.0f} s, the median burst lasts {row['burst_s']:.0f} s"
            )
    for name, one in result["capacity"].items():
        low, high = one["turns_per_s_interval"]
        lines.append(f"modelled: {name}: {one['turns_per_s']:.3g} turns/s within the SLO, 90 % {low:.3g} to {high:.3g}")
    for price in quotes.values():
        age = "of unknown date" if price["age_days"] is None else f"{price['age_days']} days old"
        usd = [
            f"{key} {price[key]:g}" for key in ("on_demand", "spot", "reserved", "input", "output") if price.get(key)
        ]
        stale = " STALE" if price["is_stale"] else ""
        what = price.get("gpu") or price["model"]
        lines.append(f"quoted: {what} at {price['provider']}: {', '.join(usd)} USD ({price['source']}, {age}){stale}")
    lines += [f"left out: {name}: {reason}" for name, reason in result["skipped"].items()]
    verdict = f"cheapest within the SLO for 95 % of turns: {result['cheapest_meeting_slo']}"
    if result["nearest"]:
        verdict = f"no policy keeps the SLO for 95 % of turns; nearest: {result['nearest']}"
    return "\n".join([*lines, verdict]) + "\n"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4g}"
