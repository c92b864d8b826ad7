"""The real vLLM on this CPU, calibrated on one load and judged on another: a part of docs/accuracy.md.

    make engine ENGINE=vllm && .venv/bin/python benchmarks/calibrate_cpu_engine.py [--budget-s 600] [--write]

The engine serves a small model, wider than the tests' so that the engine and not the client is what takes time. After
the probes of `kit calibrate` the calibrated simulator says beforehand what agent sessions with pauses will see: the
same sessions are then sent by the load generator of `kit load`. On a CPU this says how well the calibration carries
over to another load, and nothing about the speed of an engine. The GPU's datasheet is only what the fit starts from.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kit import catalog
from kit.calibrate import LiveServer, calibrate, load
from kit.engine_config import EngineConfig
from kit.engines import launch, start
from kit.engines.launch import ENVIRONMENTS, ROOT, free_port
from kit.loadgen import Target
from kit.loadgen.plan import own_arrivals
from kit.simulator import Simulation, SimulationConfig, replica
from kit.simulator.answers import answers
from kit.workload import Session
from kit.workload import load as workload

MARKS = "<!-- cpu -->", "<!-- /cpu -->"
GPU, SLOTS, LONGEST = "l4-24gb", 8, 16384
WIDER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
WITHIN = {"tpot_s": ("mean", 0.10), "ttft_s": ("p50", 0.15)}


def wider(folder: Path) -> Path:
    """The tests' tiny model with more and wider layers, without weights of its own."""
    model = folder / "model"
    skipped = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(ENVIRONMENTS / "tiny-model", model, ignore=skipped, dirs_exist_ok=True)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | WIDER))
    return model


def agents(sessions: int, over_s: float) -> list[Session]:
    """Customer-service agents: turns that build on each other, tool and human pauses of some seconds."""
    body, made = workload("customer-service").session, []
    for key in range(sessions):
        drawn = body.draw(np.random.default_rng([11, key]), key, key * over_s / sessions)
        turns = [
            replace(one, new_tokens=min(one.new_tokens, 400), output_len=min(one.output_len, 60), children=(),
                    pause_after_s=min(one.pause_after_s, 8.0)) for one in drawn.turns[:5]
        ]  # fmt: skip
        made.append(replace(drawn, turns=turns, shared_prefix_tokens=min(drawn.shared_prefix_tokens, 500)))
    return made


def measure(budget_s: float, sessions: int, over_s: float, keep: Path) -> dict[str, Any]:
    """Start, probe, predict, send, compare, stop."""
    model = wider(keep)
    flags = {"max_num_seqs": SLOTS, "enforce_eager": True, "max_model_len": LONGEST, "--load-format": "dummy"}
    wanted = launch("vllm", str(model), flags, port=free_port(), served_model_name="small")
    engine = start(wanted, keep / "engine.log")
    try:
        spec, card = catalog.model(str(model)), catalog.gpu(GPU)
        server = LiveServer(Target(wanted.base_url, "small"), spec)
        config = EngineConfig(max_num_seqs=SLOTS, enforce_eager=True, max_model_len=LONGEST)
        calibrate(spec, card, config, server, out=keep / "cpu.json", budget_s=budget_s, on_cpu=True)
        found, load_ = load(keep / "cpu.json"), agents(sessions, over_s)
        predicted = {
            name: _simulated(*replica(spec, card, *basis)[:2], load_)
            for name, basis in (("before", (config,)), ("after", found.apply(spec, card, config)))
        }
        frame = server.measure(own_arrivals(load_)).frame
    finally:
        engine.stop()
    seen = {"tpot_s": {"mean": frame["tpot_s"].mean()}, "ttft_s": {"p50": frame["ttft_s"].median()}}
    rows = [{"quantity": name, "statistic": which, "within": within, "measured_s": float(seen[name][which]),
             **{when: predicted[when][name][which] for when in predicted}}
            for name, (which, within) in WITHIN.items()]  # fmt: skip
    factors = {"tpot_s": found.tpot_factor_90, "ttft_s": found.ttft_factor_90}
    now = {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "load": os.getloadavg()}
    of = {"machine": platform.machine(), "turns": len(frame), "sessions": sessions, "rows": rows}
    return {**now, **of, "probe_s": found.probe_s, "factors": factors, "probes": found.probes}


def _simulated(limits: Any, steps: Any, sessions: list[Session]) -> dict[str, Any]:
    config = SimulationConfig(limits)
    return answers(Simulation(config, steps).run(sessions), None, None, set())


def section(one: dict[str, Any]) -> str:
    """The part of docs/accuracy.md."""
    lines = [
        f"{one['date']}, vLLM on {one['cores']} cores ({one['machine']}; load average at the end "
        f"{one['load'][0]:.1f}), {one['probe_s']:.0f} s of probes, then {one['turns']} turns of {one['sessions']} "
        "agent sessions with pauses. This shows how the calibration carries over, never a GPU's speed.", "",
        "| quantity | measured ms | before | after | error | 90 % interval x/÷ | wanted |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in one["rows"]:
        cells = [f"{row[name] * 1e3:.2f}" for name in ("measured_s", "before", "after")]
        error, width = row["after"] / row["measured_s"] - 1, one["factors"][row["quantity"]]
        name = f"{row['quantity'].removesuffix('_s').upper()} {row['statistic']}"
        lines.append(f"| {name} | {' | '.join(cells)} | {error:+.1%} | {width:.2f} | within {row['within']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budget-s", type=float, default=600.0)
    options.add_argument("--sessions", type=int, default=40)
    options.add_argument("--over-s", type=float, default=120.0, help="in which they begin")
    options.add_argument("--write", action="store_true", help="into docs/accuracy.md")
    given = options.parse_args()
    keep = ROOT / "runs" / "calibrate_cpu_engine"
    keep.mkdir(parents=True, exist_ok=True)
    one = measure(given.budget_s, given.sessions, given.over_s, keep)
    with (keep / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(one) + "\n")
    text = section(one)
    sys.stdout.write(text + "\n")
    for row in one["probes"]:
        if row["percentile"] == 50:
            times = " ".join(f"{row[name] * 1e3:10.2f}" for name in ("measured_s", "before_s", "after_s"))
            sys.stdout.write(f"{row['probe']:<12}{row['group']:>8} {row['quantity']:<8}{times}\n")
    if given.write:
        page = ROOT / "docs" / "accuracy.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0] + "\n")
        after = rest.partition(MARKS[1])[2]
        page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
