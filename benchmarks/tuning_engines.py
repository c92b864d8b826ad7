"""`kit tune` on the real vLLM and SGLang on the CPU, and the tuned value beside its neighbours.

    make engine ENGINE=vllm
    .venv/bin/python benchmarks/tuning_engines.py [--engines vllm,sglang] [--write]

A tiny model: this shows that the tuner works with the engines, never a speed. What is measured is kept in
runs/tuning-ENGINE, so an interrupted run goes on; a table goes between the markers of docs/performance.md.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.engine_config import EngineConfig
from kit.engines.launch import ENVIRONMENTS, ROOT, template
from kit.metrics import wilson_interval
from kit.tune import Boot, Level, Result
from kit.tune.ask import How, Question, answer, neighbours

DOCS = ROOT / "docs" / "performance.md"
MARKS = "<!-- tuning engines: begin -->\n", "<!-- tuning engines: end -->"
MODEL, WORKLOAD = str(ENVIRONMENTS / "tiny-model"), str(ROOT / "tests" / "engines" / "tuning.yaml")
CONFIG: dict[str, Any] = {"max_model_len": 8192, "enforce_eager": True}
LOAD: dict[str, Any] = {"slo_ttft_s": 0.5, "duration_s": 20.0, "loaded": 0.7}
SLO_TPOT_S = {"vllm": 0.03, "sglang": 0.1}  # SGLang's kernels are a fallback here, several times slower


def question(engine: str) -> Question:
    """The tuning of that engine; the GPU only sets where the search begins."""
    config = EngineConfig(engine=engine, **CONFIG)
    command = template(engine, MODEL, CONFIG)
    return Question(
        MODEL, "l4-24gb", config, WORKLOAD, "engine_command", command, None, slo_tpot_s=SLO_TPOT_S[engine], **LOAD
    )


def tell(seen: Boot | Level) -> None:
    """A line of progress."""
    what = f"start {seen.index}" if isinstance(seen, Boot) else f"{seen.kind} {seen.concurrency or 'all'}"
    rate = "" if isinstance(seen, Boot) else f" {seen.goodput_requests_per_s:.3g} in time/s"
    print(f"{time.strftime('%H:%M:%S')} max_num_seqs {seen.max_num_seqs}, {what}{rate}", flush=True)


def pooled(levels: Sequence[Level]) -> tuple[float, float, float]:
    """Goodput of all levels together, with the interval that their counted turns leave."""
    good = sum(one.slo_attainment_fraction * one.n for one in levels)
    turns, seconds = sum(one.n for one in levels), sum(one.duration_s for one in levels)
    low, high = wilson_interval(round(good), turns) or (0.0, 1.0)
    return good / seconds, low * turns / seconds, high * turns / seconds


def measured(engine: str) -> list[str]:
    """Rows of the table: the tuned value, then its neighbours on starts of their own."""
    asked, folder, how = question(engine), ROOT / "runs" / f"tuning-{engine}", How(own=False)
    result = answer(asked, folder, how, tell)
    spent_s = spent(folder / "tuning.jsonl")
    chosen = result.recommended.get("max_num_seqs")
    if chosen is None:
        return [f"| {engine} | none | - | - | {result.status} | {result.boots} | {spent_s / 60:.1f} |"]
    values = sorted({max(1, chosen // 4), max(1, chosen // 2), 2 * chosen} - {chosen})
    tuned = [Level(**one) for one in result.evidence if one["kind"] == "open" and one["max_num_seqs"] == chosen]
    beside = {chosen: [one for one in tuned if one.concurrency is None]} | neighbours(asked, folder, how, values)
    return [row(engine, n, beside[n], result, spent_s if n == chosen else None) for n in (chosen, *values)]


def spent(file: Path) -> float:
    """Seconds of engine starts and levels in a tuning's file."""
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return sum(one["start_s"] if "flags" in one else one["duration_s"] for one in records)


def row(engine: str, value: int, levels: Sequence[Level], result: Result, spent_s: float | None) -> str:
    """One line of the table."""
    rate, low, high = pooled(levels)
    met = sum(one.slo_attainment_fraction * one.n for one in levels) / sum(one.n for one in levels)
    verdict = "-" if spent_s is None else f"{result.status}{', confirmed' if result.confirmed else ''}"
    rest = "- | -" if spent_s is None else f"{result.boots} | {spent_s / 60:.1f}"
    tuned = "" if spent_s is None else " (tuned)"
    return f"| {engine} | {value}{tuned} | {rate:.1f} ({low:.1f} to {high:.1f}) | {met:.0%} | {verdict} | {rest} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="vllm,sglang")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = ["| engine | max_num_seqs | turns in time per s | in time | verdict | starts | minutes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for engine in options.engines.split(","):
        lines += measured(engine)
    print("\n".join(lines))
    if options.write:
        text = DOCS.read_text(encoding="utf-8")
        inner = "\n".join([*lines, ""])
        pattern = re.compile(re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1]), re.DOTALL)
        DOCS.write_text(pattern.sub(lambda _: MARKS[0] + inner + MARKS[1], text), encoding="utf-8")


if __name__ == "__main__":
    main()
