"""The minute model against days simulated whole, and what a month of policies takes: tables of docs/performance.md.

python benchmarks/fleet.py [--write]
"""

import argparse
import re
from datetime import date
from pathlib import Path
from time import process_time

from kit import scenario
from kit.errors import UserError
from kit.fleet import Study, compare
from kit.fleet.traffic import DAY_S

DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
POLICIES = ("on-demand", "scale-to-zero", "reserved", "spot", "burst", "spot-fallback", "tiered")
BURSTS = {
    "500 in a minute": [{"at_s": 36_000, "sessions": 500, "over_s": 60}],
    "300 at night, 1,000 at the peak": [
        {"at_s": 10_800, "sessions": 300, "over_s": 30},
        {"at_s": 50_400, "sessions": 1000, "over_s": 60},
    ],
}
CASES = (("l40s-48gb", "500 in a minute"), ("l40s-48gb", "300 at night, 1,000 at the peak"),
         ("h100-sxm-80gb", "300 at night, 1,000 at the peak"))  # fmt: skip
DAY, SPOT_SEEDS = 1, 24


def study(gpu: str | None, bursts: list[dict[str, float]], days: float, seed: int = 0) -> Study:
    """10,000 conversations a day of the customer service scenario, with daily bursts."""
    case = scenario.load("customer-service-daily")
    return Study(
        case.model_copy(update={"fleet": {"gpu": gpu, "bursts": bursts, "tier_gpu": "rtx-5090-32gb"}}), days, seed
    )


def compared(gpu: str, bursts: str) -> list[str]:
    """A row for each policy of one sampled day: by the turn, by the minute, CPU seconds of both."""
    one, rows = study(gpu, BURSTS[bursts], DAY + 1), []
    for policy in POLICIES:
        try:
            parts = one.parts(policy)
        except UserError:
            continue
        found, spent_s = [], []
        for whole in (True, False):
            begun = process_time()
            model = one.settings.interruption_model
            found.append(one.run(parts, model, DAY * DAY_S, (DAY + 1) * DAY_S, whole=whole))
            spent_s.append(process_time() - begun)
        turns, minutes = found
        met = [100 * row["slo_attainment_fraction"] for row in found]
        cost = minutes["usd_per_month"] / turns["usd_per_month"] - 1
        rows.append(
            f"| {gpu} | {bursts} | {policy} | {turns['usd_per_month']:,.0f} | {cost:+.1%} "
            f"| {met[0]:.1f} | {met[1] - met[0]:+.1f} | {spent_s[0]:.1f} | {spent_s[1]:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def interrupted(gpu: str, bursts: str) -> str:
    """Lost turns and attainment of the spot policy over many seeds, whole and by the minute; one ramp for all."""
    kinds, lost, met = None, [], []
    for seed in range(SPOT_SEEDS):
        one = study(gpu, BURSTS[bursts], DAY + 1, seed)
        one.kinds = kinds or one.kinds
        parts, kinds, window = one.parts("spot"), one.kinds, (DAY * DAY_S, (DAY + 1) * DAY_S)
        rows = [one.run(parts, one.settings.interruption_model, *window, whole=whole) for whole in (True, False)]
        lost.append([row["lost_turns"] for row in rows])
        met.append([100 * row["slo_attainment_fraction"] for row in rows])
    whole, minutes = map(list, zip(*lost, strict=True))
    gaps = sorted(abs(b - a) for a, b in met)
    worst = max(lost, key=lambda pair: abs(pair[1] - pair[0]))
    return (
        f"Spot on {gpu} over {SPOT_SEEDS} seeds, {bursts}: {sum(whole):.0f} turns lost by the turn and "
        f"{sum(minutes):.0f} by the minute, at worst {worst[0]:.0f} against {worst[1]:.0f} on one seed; attainment "
        f"{gaps[len(gaps) // 2]:.1f} points apart at the median and more than 2 on {sum(gap > 2 for gap in gaps)} "
        f"seeds, at worst {gaps[-1]:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    given = parser.parse_args()
    head = "| GPU | daily burst | policy | USD/month | minutes | % within SLO | minutes, points | s whole | s minutes |"
    lines = [head, "|---" * 9 + "|"]
    for gpu, bursts in CASES:
        lines += compared(gpu, bursts)
    begun = process_time()
    month = compare(study(None, [], 30))
    spent_s = process_time() - begun
    told = (
        f"A month of {len(month['policies'])} policies, whole days and intervals included: {spent_s:.0f} s of one core."
    )
    told += "\n\n" + interrupted("h100-pcie-80gb", "300 at night, 1,000 at the peak")
    print(told)
    if given.write:
        body = "\n".join([f"Measured on {date.today()}, CPU seconds of one core.", "", *lines, "", told])
        text = re.sub(
            r"(?s)(<!-- fleet -->\n).*?(\n<!-- /fleet -->)", lambda m: m[1] + body + m[2], DOCS.read_text("utf-8")
        )
        DOCS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
