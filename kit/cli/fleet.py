"""kit fleet: what a scenario's traffic costs under each policy, and which of them meet the SLO."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from kit.cli import options

FIGURES = {
    "usd_per_month": "USD/month", "usd_per_1k_conversations": "per 1k conv.", "usd_per_million_tokens": "per M tokens",
    "slo_attainment_fraction": "within SLO", "interruptions": "killed", "lost_turns": "lost", "idle_fraction": "idle",
}  # fmt: skip
MARKETS = ("on_demand", "spot", "reserved", "input", "output")


def command(
    scenario: Annotated[str, Option(help="key of data/scenarios, or a YAML file")],
    policies: Annotated[str, Option(help="all, or some of data/fleet.yaml with commas between")] = "all",
    days: Annotated[float, Option(help="up to one day every turn is simulated; more days go by the minute")] = 30.0,
    seed: int = 0,
    refresh_prices: Annotated[str | None, Option(help="add the offers at this address to the price book")] = None,
    json_output: options.Json = False,
) -> None:
    """Runs fleet policies on a scenario's traffic and prices them."""
    from kit import prices
    from kit.fleet import Study, compare
    from kit.scenario import load

    if refresh_prices:
        prices.refresh(base_url=refresh_prices)
    study = Study(load(Path(scenario) if Path(scenario).is_file() else scenario), days, seed)
    result = compare(study, policies, sys.stderr.write)
    options.tell(result, _text, json_output)


def _text(result: dict[str, Any]) -> str:
    """The policies with what they rest on; every line says modelled or quoted."""
    lines = [f"{result['conversations']:,} conversations in {result['days']:g} days on {result['gpu']}, modelled:"]
    lines.append(f"{'policy':<24}" + "".join(f"{text:>13}" for text in FIGURES.values()))
    ranked = sorted(result["policies"].items(), key=lambda one: one[1]["usd_per_month"])
    for name, row in ranked:
        under = {name: row} | {f"  {model} model": one for model, one in row["other_interruptions"].items()}
        for label, one in under.items():
            lines.append(f"{label:<24}" + "".join(f"{options.number(one[key]):>13}" for key in FIGURES))
        usd, met = (_interval(row[key]) for key in ("usd_per_month_interval", "slo_attainment_interval"))
        lines.append(f"  90 %: {usd} USD/month sized anew, {met} within SLO as it is")
        for check in row["checks"]:
            off = f"cost {check['usd_difference_fraction']:+.1%}, attainment {check['attainment_difference']:+.1%}"
            lines.append(f"  minutes against turns on day {check['day']}: {off}")
        if row.get("lead_outlasts_burst"):
            low, high = map(round, row["lead_time_s"])
            lines.append(f"  a new replica takes {low} to {high} s, the median burst lasts {row['burst_s']:.0f} s")
    for name, one in result["capacity"].items():
        if interval := one["turns_per_s_interval"]:
            told = f"{one['turns_per_s']:.3g} turns/s within the SLO, 90 % {interval[0]:.3g} to {interval[1]:.3g}"
            lines.append(f"modelled: {name}: {told}")
    quotes = {json.dumps(price): price for _, row in ranked for price in row["prices"]}
    lines += [_quoted(price) for price in quotes.values()]
    lines += [f"left out: {name}: {reason}" for name, reason in result["skipped"].items()]
    lines.append(f"cheapest within the SLO for 95 % of turns: {result['cheapest_meeting_slo'] or 'none'}")
    if result["nearest"]:
        lines.append(f"no policy keeps the SLO for 95 % of turns; nearest: {result['nearest']}")
    return "\n".join(lines) + "\n"


def _quoted(price: dict[str, Any]) -> str:
    age = "unknown date" if price["age_days"] is None else f"{price['age_days']} days old"
    usd = ", ".join(f"{key} {price[key]:g}" for key in MARKETS if price.get(key)) + " USD"
    what = f"{price.get('gpu') or price['model']} at {price['provider']}: {usd} ({price['source']}, {age})"
    return f"quoted: {what}{' STALE' if price['is_stale'] else ''}"


def _interval(ends: list[float] | None) -> str:
    return f"{options.number(ends[0])} to {options.number(ends[1])}" if ends else "unknown"
