"""Calibration against machines with hidden speeds, overheads, KV pools and stalls: a part of docs/accuracy.md.

    .venv/bin/python benchmarks/mystery_machines.py [--seeds 20] [--first 0] [--http [--realtime]] [--write]

A hidden machine (`kit emulate --truth SEED`) is probed in virtual time for about ten minutes of its own time and
calibrated from that alone; then workloads that were not probed are played on it and on the calibrated model.
--http does it in real time: `kit emulate --truth SEED`, probed by `kit calibrate`. runs/mystery_machines.jsonl keeps
every result; --seeds 0 --write renders what it holds.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np

from kit import catalog
from kit.calibrate import Calibration, VirtualServer, calibrate, load
from kit.catalog import GpuSpec, ModelSpec
from kit.emulator import hide
from kit.engine_config import EngineConfig
from kit.scheduler import SchedulerConfig, StepTime
from kit.simulator import Simulation, SimulationConfig, replica
from kit.simulator.answers import answers
from kit.workload import Session, Turn
from kit.workload import load as workload

ROOT = Path(__file__).resolve().parents[1]
KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
CASES = (
    ("llama-3.1-8b", "h100-sxm-80gb", {}),
    ("qwen3-32b", "h200-sxm-141gb", {"quantization": "fp8"}),
    ("gpt-oss-20b", "l40s-48gb", {}),
    ("llama-3.3-70b", "h100-sxm-80gb", {"gpu_count": 4, "max_model_len": 32768}),
    ("llama-3.1-8b", "a100-sxm-80gb", {"engine": "sglang"}),
)  # fmt: skip
MARKS, KEPT = ("<!-- mystery -->", "<!-- /mystery -->"), ROOT / "runs" / "mystery_machines.jsonl"
TPOT_WITHIN, TTFT_WITHIN, SHARE = 0.03, 0.08, 0.9  # what is asked of a seed, and of the seeds


@dataclass(frozen=True)
class Machine:
    """One seed: what is known of it, and what it is."""

    seed: int

    def case(self) -> tuple[ModelSpec, GpuSpec, EngineConfig]:
        name, card, flags = CASES[self.seed % len(CASES)]
        return catalog.model(name), catalog.gpu(card), EngineConfig(**flags)

    def truth(self) -> tuple[SchedulerConfig, StepTime]:
        limits, steps, _ = replica(*self.case())
        return hide(self.seed, limits, steps)


def closed(streams: int, prompt: int, output: int, shared: float = 0.0, rounds: int = 16) -> list[Session]:
    """Streams that always have one request open, with a part of the prompt shared."""
    rng, prefix = Random(streams), int(prompt * shared)

    def turn() -> Turn:
        new, out = (max(1, round(mean * rng.uniform(0.7, 1.3))) for mean in (prompt - prefix, output))
        return Turn(new, out, 0.003, compact_to=0)

    return [Session(key, 0.0, [turn() for _ in range(rounds)], 0, prefix) for key in range(streams)]


def arriving(rate_per_s: float, prompt: int, output: int, count: int = 300) -> list[Session]:
    """Single requests at random times."""
    rng = Random(1)
    times = np.cumsum([rng.expovariate(rate_per_s) for _ in range(count)]).tolist()
    lengths = [[max(1, round(mean * rng.uniform(0.5, 1.5))) for mean in (prompt, output)] for _ in times]
    return [Session(key, at, [Turn(*pair)]) for key, (at, pair) in enumerate(zip(times, lengths, strict=True))]


def agents(preset: str, sessions: int, over_s: float) -> list[Session]:
    """Agent sessions of a preset with their pauses, arriving evenly over that time, twelve turns each at most."""
    body, made = workload(preset).session, []
    for key in range(sessions):
        drawn = body.draw(np.random.default_rng([7, key]), key, key * over_s / sessions)
        made.append(replace(drawn, turns=[replace(one, children=()) for one in drawn.turns[:12]]))
    return made


def workloads(limits: SchedulerConfig, steps: StepTime) -> dict[str, list[Session]]:
    """What is judged: other lengths, streams and arrivals than any probe has, sized by the uncalibrated model."""
    sim = Simulation(SimulationConfig(limits), steps).run(closed(64, 1200, 200))
    rate = answers(sim, None, None, set())["requests_per_s"]
    return {
        "closed 8, 3000/400": closed(8, 3000, 400),
        "closed 32, 1500/250": closed(32, 1500, 250),
        "closed 128, 300/300": closed(128, 300, 300, rounds=8),
        "closed 24, 6000/200, 75 % shared": closed(24, 6000, 200, 0.75),
        "open, half load, 1200/200": arriving(0.5 * rate, 1200, 200),
        "customer service": agents("customer-service", 150, 300.0),
        "coding agents": agents("coding-agent", 40, 600.0),
    }


def outcome(limits: SchedulerConfig, steps: StepTime, sessions: list[Session]) -> tuple[float, float]:
    """TPOT mean and TTFT p50 in s."""
    config = SimulationConfig(limits, warm=True)
    sim = Simulation(config, steps).run(sorted(sessions, key=lambda one: one.arrival_s))
    found = answers(sim, None, None, set())
    return found["tpot_s"]["mean"], found["ttft_s"]["p50"]


def virtual(machine: Machine, folder: Path) -> Calibration:
    """Probed in virtual time."""
    calibrate(*machine.case(), VirtualServer(*machine.truth()), out=folder / "found.json", log=lambda text: None)
    return load(folder / "found.json")


def over_http(machine: Machine, folder: Path, first: list[str]) -> Calibration:
    """Probed in real time by the two commands, each behind the words of `first`."""
    name, card, flags = CASES[machine.seed % len(CASES)]
    engine = [part for flag, value in flags.items() for part in (f"--{flag.replace('_', '-')}", str(value))]
    asked = ["--model", name, "--gpu", card, *engine, "--json"]
    emulate = [*first, *KIT, "emulate", *asked, "--port", "0", "--truth", str(machine.seed)]
    process = subprocess.Popen(emulate, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["base_url"]  # type: ignore[union-attr]
        probe = [*first, *KIT, "calibrate", "--base-url", url, *asked, "--out", str(folder / "found.json")]
        subprocess.run(probe, check=True, stdout=subprocess.DEVNULL)
    finally:
        process.terminate()
        process.wait()
    return load(folder / "found.json")


def judge(seed: int, http: bool, first: list[str]) -> dict[str, Any]:
    """The errors of one seed on every workload, before and after calibration."""
    machine, begun = Machine(seed), perf_counter()
    model, gpu, config = machine.case()
    folder = KEPT.with_name(f"mystery_machines-{seed}{'-http' * http}")
    folder.mkdir(exist_ok=True)
    (folder / "found.json").unlink(missing_ok=True)
    found = over_http(machine, folder, first) if http else virtual(machine, folder)
    wall_s = perf_counter() - begun
    plain, calibrated = replica(model, gpu, config), replica(model, gpu, *found.apply(model, gpu, config))
    rows = []
    for name, sessions in workloads(plain[0], plain[1]).items():
        truth, before, after = (outcome(*one[:2], sessions) for one in (machine.truth(), plain, calibrated))
        errors = {when: [told / true - 1 for told, true in zip(one, truth, strict=True)] for when, one in
                  (("before", before), ("after", after))}  # fmt: skip
        rows.append({"workload": name, "truth": truth, **errors})
    passed = all(abs(tpot) <= TPOT_WITHIN and abs(ttft) <= TTFT_WITHIN for tpot, ttft in (row["after"] for row in rows))
    factors = {"ttft_factor_90": found.ttft_factor_90, "tpot_factor_90": found.tpot_factor_90}
    return {"seed": seed, "http": http, "case": CASES[seed % len(CASES)], "probe_s": found.probe_s, "wall_s": wall_s,
            "passed": passed, "rows": rows, **factors}  # fmt: skip


def tell(one: dict[str, Any]) -> str:
    """One seed as it comes."""
    lines = [f"seed {one['seed']} {one['case'][0]} {one['case'][1]}: {'passed' if one['passed'] else 'FAILED'}, "
             f"{one['probe_s']:.0f} s of probes, {one['wall_s']:.0f} s in all"]  # fmt: skip
    for row in one["rows"]:
        was, now = ("TPOT {:+.1%} TTFT {:+.1%}".format(*row[when]) for when in ("before", "after"))
        lines.append(f"    {row['workload']:<34} {was} -> {now}")
    return "\n".join(lines)


def section(found: list[dict[str, Any]]) -> str:
    """The part of docs/accuracy.md."""
    virtual_ones = [one for one in found if not one["http"]]
    passed, spent = sum(one["passed"] for one in virtual_ones), [one["probe_s"] for one in virtual_ones]
    lines = [
        f"{passed} of {len(virtual_ones)} machines in virtual time are within {TPOT_WITHIN:.0%} (TPOT mean) and "
        f"{TTFT_WITHIN:.0%} (TTFT p50) on all {len(found[0]['rows'])} workloads, after {min(spent):.0f} to "
        f"{max(spent):.0f} s of probes (wanted: {SHARE:.0%} of them). Machines marked HTTP were probed in real time.",
        "",
        "| seed | model, GPU | probes s | worst TPOT before | after | worst TTFT before | after | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda each: (each["http"], each["seed"])):
        worst = [max(abs(row[when][which]) for row in one["rows"]) for which in (0, 1) for when in ("before", "after")]
        name = f"{one['seed']}{' HTTP' if one['http'] else ''} | {one['case'][0]}, {one['case'][1]}"
        cells = " | ".join(f"{error:.1%}" for error in worst)
        lines.append(f"| {name} | {one['probe_s']:.0f} | {cells} | {'yes' if one['passed'] else 'no'} |")
    head = "| workload, virtual | TPOT error, median | worst | TTFT error, median | worst | TPOT covered | TTFT |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for index, row in enumerate(virtual_ones[0]["rows"]):
        errors = np.abs([one["rows"][index]["after"] for one in virtual_ones])
        factors = np.array([[one["tpot_factor_90"], one["ttft_factor_90"]] for one in virtual_ones])
        inside = (np.abs(np.log1p([one["rows"][index]["after"] for one in virtual_ones])) <= np.log(factors)).mean(
            axis=0
        )
        told = [f"{value:.1%}" for which in (0, 1) for value in (np.median(errors[:, which]), errors[:, which].max())]
        lines.append(f"| {row['workload']} | {' | '.join(told)} | {inside[0]:.0%} | {inside[1]:.0%} |")
    widths = np.median([[one["tpot_factor_90"], one["ttft_factor_90"]] for one in virtual_ones], axis=0)
    lines += ["", f"Median 90 % intervals of these calibrations: TPOT x/÷ {widths[0]:.3f}, TTFT x/÷ {widths[1]:.3f}."]
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the section between its marks in docs/accuracy.md."""
    page = ROOT / "docs" / "accuracy.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0] + "\n")
    page.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--http", action="store_true", help="in real time")
    options.add_argument("--realtime", action="store_true", help="SCHED_FIFO, so that other work is not measured along")
    options.add_argument("--write", action="store_true", help="what runs/ holds into docs/accuracy.md")
    given = options.parse_args()
    KEPT.parent.mkdir(exist_ok=True)
    for seed in range(given.first, given.first + given.seeds):
        one = judge(seed, given.http, ["chrt", "--fifo", "10"] if given.realtime else [])
        print(tell(one), flush=True)
        with KEPT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
    lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    found = list({(one["seed"], one["http"]): one for one in lines}.values())  # the latest of each
    print(f"{sum(one['passed'] for one in found)} of {len(found)} within")
    if given.write:
        write(section(found))


if __name__ == "__main__":
    main()
