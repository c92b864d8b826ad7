"""The tuner against hidden machines in virtual time: goodput of what it recommends, against the best of a dense grid.

    .venv/bin/python benchmarks/tuning.py [--seeds 20] [--settings kv,tpot] [--emulator] [--write]

Each case (setting, seed) is one line of runs/tuning.jsonl; a case that is there is not run again. With --emulator
values are measured in real time, over HTTP by kit/loadgen, and put beside virtual time (runs/tuning-emulator.jsonl).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import numpy as np

from kit import catalog, workload
from kit.engine_config import EngineConfig
from kit.memory import plan
from kit.memory.startup import start_up
from kit.metrics import meets_slo
from kit.predict import Ask
from kit.simulator import Simulation, SimulationConfig
from kit.simulator.answers import as_requests, columns
from kit.tune import Goal, Offer, Setup, Store, VirtualMachine, expected, tune
from kit.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
REAL, REAL_S, REAL_TRUTH = ROOT / "runs" / "tuning-emulator.jsonl", 120.0, 3
OUT, PAGE = ROOT / "runs" / "tuning.jsonl", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tuning: begin -->", "<!-- tuning: end -->"
GRID = (2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 1024)
AROUND = (0.7, 0.85, 1.0, 1.15, 1.3)  # of the value found: what a coarse grid would miss
JUDGED_BY = (11, 12)  # loads that no tuner has seen
BASELINE_SEEDS = 3  # the two other ways are slow: so many machines of each setting
RANDOM_TRIALS = 20
STORAGE = "nvme-local"  # where the weights lie
AUTO_SEQS, AUTO_TOKENS = (128, 256), (512, 1024, 2048, 4096)  # the grid of vLLM's auto_tune.sh


@dataclass(frozen=True)
class Setting:
    """A machine (before it is hidden), its load and its limits."""

    what: str
    model: str
    gpu: str
    preset: str
    changes: dict[str, Any]  # of the preset, by dotted name
    offer: tuple[float, int, int]  # seconds, sessions expected in them, sessions at once
    goal: tuple[float, float]
    engine: str = "vllm"

    def machine(self, truth: int | None) -> VirtualMachine:
        """The hidden machine of that seed; None: the modelled one."""
        config = EngineConfig(engine=self.engine)
        parts = catalog.model(self.model), catalog.gpu(self.gpu)
        return VirtualMachine(*parts, config, Offer(self.workload(), *self.offer), Goal(*self.goal), truth)

    def workload(self) -> Workload:
        """The preset with its changes."""
        found = workload.load(self.preset).model_dump(exclude_unset=True)
        for name, value in self.changes.items():
            *folders, last = name.split(".")
            place = found
            for folder in folders:
                place = place[folder]
            place[last] = value
        return Workload.model_validate(found)


STEADY = {"arrivals": {"kind": "poisson", "rate_per_s": 1.0}}
SETTINGS = {
    "kv": Setting(
        "the KV pool: a model that fills its card", "qwen2.5-32b", "h100-sxm-80gb", "customer-service",
        STEADY | {"session.first_new_tokens": {"median": 2000, "sigma": 0.6, "max": 8000}},
        (480.0, 120, 20), (3.0, 0.1),
    ),
    "tpot": Setting(
        "TPOT: 18 ms, and a burst that may wait", "llama-3.1-8b", "h100-sxm-80gb", "customer-service", STEADY,
        (120.0, 150, 100), (6.0, 0.018),
    ),
    "ttft": Setting(
        "TTFT in a burst of calls", "mistral-nemo-2407", "l40s-48gb", "silent-hour-then-500-calls", STEADY,
        (240.0, 200, 60), (3.0, 0.3),
    ),
    "knee": Setting(
        "the knee: wide limits, long answers", "qwen3-8b", "l40s-48gb", "reasoning",
        STEADY | {"session.output_len": {"median": 500, "sigma": 0.5, "max": 3000}}, (300.0, 100, 60), (20.0, 0.4),
    ),
    "agents": Setting(
        "sub-agents on a mixture of experts", "qwen3-30b-a3b-2507", "h200-sxm-141gb", "multi-agent", {},
        (240.0, 24, 8), (1.0, 0.04),
    ),
    "sglang": Setting(
        "voice on SGLang's scheduler", "llama-3.1-8b", "h100-sxm-80gb", "voice", {}, (120.0, 130, 40), (0.3, 0.035),
        "sglang",
    ),
}  # fmt: skip


@cache
def prior(name: str) -> int | None:
    """What the modelled machine would want."""
    one = SETTINGS[name].machine(None)
    return expected(Setup(*one.parts, one.config), one.offer, one.goal)


@cache
def start_s(name: str) -> float:
    """Seconds of an engine start on a warm host: the middle of data/startup.yaml's range."""
    one = SETTINGS[name].machine(None)
    memory = plan(*one.parts, one.config)
    return mean(start_up(memory.weights.size_bytes, STORAGE).total_s(warm_host=True))


def goodput(name: str, truth: int, **flags: int) -> float:
    """Good turns per second of a start with these flags, mean over the loads that judge."""
    one = SETTINGS[name].machine(truth)
    boot = one.boot(flags, 1)
    return mean(one.open_loop(boot, seed).goodput_requests_per_s for seed in JUDGED_BY)


def case(name: str, truth: int) -> dict[str, Any]:
    """One hidden machine: what the tuner finds, and the grid."""
    begun = process_time()
    one = SETTINGS[name].machine(truth)
    setup = Setup(*one.parts, one.config, prior(name))
    found = tune(one, setup, one.goal, Store(None, {}))
    chosen = found.recommended["max_num_seqs"]
    grid = {
        n: goodput(name, truth, max_num_seqs=n) for n in sorted({*GRID, *(max(1, round(chosen * x)) for x in AROUND)})
    }
    told = {key: value for key, value in asdict(found).items() if key not in ("evidence", "engine_args", "reasons")}
    record = {"setting": name, "truth": truth, "grid": grid, "chosen": chosen, "levels": len(found.evidence), **told}
    record |= {"reached": grid[chosen] / max(grid.values()), "minutes": minutes(name, found.boots, one.spent_s)}
    if truth <= BASELINE_SEEDS:
        most = max(grid.values())
        record |= {way.__name__: way(name, truth, most) for way in (auto_tune, random_trials)}
    return record | {"cpu_s": process_time() - begun}


def minutes(name: str, boots: int, measured_s: float) -> float:
    """Engine minutes: starts and what was measured on them."""
    return (boots * start_s(name) + measured_s) / 60


def random_trials(name: str, truth: int, most: float) -> dict[str, float]:
    """So many starts with max_num_seqs drawn log-uniformly, one open loop on each; the best one kept."""
    one, rng = SETTINGS[name].machine(truth), np.random.default_rng([truth, 7])
    seen = {}
    for n in np.exp(rng.uniform(0.0, np.log(1024), RANDOM_TRIALS)).round().astype(int).tolist():
        seen[n] = one.open_loop(one.boot({"max_num_seqs": n}, 1), 1).goodput_requests_per_s
    best = max(seen, key=lambda n: seen[n])
    reached = goodput(name, truth, max_num_seqs=best) / most
    return {"reached": min(1.0, reached), "boots": RANDOM_TRIALS, "minutes": minutes(name, RANDOM_TRIALS, one.spent_s)}


def auto_tune(name: str, truth: int, most: float) -> dict[str, float]:
    """In the manner of vLLM's auto_tune.sh: a start per cell, 1,000 fixed prompts at once, then slower by 1 a second.

    Its limit is on the end-to-end latency's p99 alone: here TTFT limit + mean output x TPOT limit.
    """
    setting, spent_s, best = SETTINGS[name], 0.0, (-1.0, 128, 4096)
    mean_turn = [turn for seed in range(20) for one in setting.machine(None).offer.arriving(seed)[:20] for turn in
                 zip(one.input_lens(), [turn.output_len for turn in one.turns], strict=True)]  # fmt: skip
    lengths = [round(mean(column)) for column in zip(*mean_turn, strict=True)]
    limit_s = setting.goal[0] + lengths[1] * setting.goal[1]
    for seqs in AUTO_SEQS:
        for tokens in AUTO_TOKENS:
            one = setting.machine(truth)
            one.boot({"max_num_seqs": seqs, "max_num_batched_tokens": tokens}, 1)
            rate, took_s = _steps_down(one, lengths, limit_s)
            spent_s += took_s
            best = max(best, (rate, seqs, tokens), key=lambda cell: cell[0])
    reached = goodput(name, truth, max_num_seqs=best[1], max_num_batched_tokens=best[2]) / most
    boots = len(AUTO_SEQS) * len(AUTO_TOKENS)
    return {"reached": reached, "boots": boots, "minutes": minutes(name, boots, spent_s)}


def _steps_down(one: VirtualMachine, lengths: list[int], limit_s: float) -> tuple[float, float]:
    """Throughput with the latency in its limit, and the seconds that it took to find."""
    rate, took_s = _fixed(one, lengths, 1000, None, limit_s)
    if rate > 0:
        return rate, took_s
    throughput, spent_s = -rate, took_s
    for slower in range(int(throughput) + 1, 0, -1):
        rate, took_s = _fixed(one, lengths, 100, float(slower), limit_s)
        spent_s += took_s
        if rate > 0:
            return rate, spent_s
    return 0.0, spent_s


def _fixed(
    one: VirtualMachine, lengths: list[int], count: int, rate: float | None, limit_s: float
) -> tuple[float, float]:
    """Requests per second of fixed prompts (negative where the p99 misses the limit), and the seconds of the run."""
    ask = Ask(*lengths, request_rate=rate) if rate else Ask(*lengths, concurrency=count, requests_per_stream=1)
    sessions = list(ask.sessions(0.0, one.limits.max_model_len))[:count]
    sim = Simulation(SimulationConfig(one.limits, warm=True), one.steps).run(sessions)
    turns = columns(sim)
    requests = as_requests(turns, sim.now / 1e15)
    assert meets_slo(requests, None, None).all()
    span_s = float(turns["end_s"].max())
    p99_s = float(np.quantile(turns["end_s"] - turns["arrival_s"], 0.99))
    return (1 if p99_s <= limit_s else -1) * len(turns) / span_s, span_s


def in_real_time(name: str, truth: int) -> None:
    """The tuned value and others around it on the emulator of that hidden machine, beside the same in virtual time."""
    from tempfile import TemporaryDirectory

    from kit import measure
    from kit.tune.server import Server

    duration_s, sessions, burst = SETTINGS[name].offer
    share = REAL_S / duration_s
    setting = replace(SETTINGS[name], offer=(REAL_S, round(sessions * share), round(burst * share)))
    one = setting.machine(truth)
    chosen = tune(one, Setup(*one.parts, one.config, prior(name)), one.goal, Store(None, {})).recommended[
        "max_num_seqs"
    ]
    done = {(x["setting"], x["max_num_seqs"]) for x in read(REAL)}

    def begin(flags: dict[str, Any], log: Path) -> Any:
        return measure.emulate(setting.model, setting.gpu, replace(one.config, **flags), log, {"truth": truth})

    for n in sorted({max(1, chosen // 4), chosen // 2, chosen, 4 * chosen}):
        if (name, n) in done:
            continue
        with TemporaryDirectory(prefix="kit-") as folder, Server(begin, one.offer, one.goal, Path(folder)) as real:
            seen = real.open_loop(real.boot({"max_num_seqs": n}, 1), JUDGED_BY[0])
        virtual = one.open_loop(one.boot({"max_num_seqs": n}, 1), JUDGED_BY[0])
        keys = ("n", "goodput_requests_per_s", "slo_attainment_fraction", "ttft_s", "tpot_s", "warnings")
        told = {"real": {k: asdict(seen)[k] for k in keys}, "virtual": {k: asdict(virtual)[k] for k in keys}}
        with REAL.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"setting": name, "truth": truth, "chosen": chosen, "max_num_seqs": n, **told}) + "\n"
            )
        print(name, n, *(f"{way} {x['goodput_requests_per_s']:.3f}" for way, x in told.items()), flush=True)


def real_table(rows: list[dict[str, Any]]) -> str:
    """The table of what was measured in real time."""
    lines = [
        f"In real time, {REAL_S:g} s of the same loads over HTTP; the emulator's client and server share the machine:",
        "",
        "| what limits | max_num_seqs | good turns/s in virtual time | in real time | tuned | client in time |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        values = [f"{one[way]['goodput_requests_per_s']:.2f}" for way in ("virtual", "real")]
        tuned = "yes" if one["max_num_seqs"] == one["chosen"] else ""
        late = any("the client was the limit" in text for text in one["real"]["warnings"])
        cells = [SETTINGS[one["setting"]].what, str(one["max_num_seqs"]), *values, tuned, "no" if late else "yes"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if rows else ""


def run(names: list[str], seeds: int) -> None:
    """Every case that is not kept yet; seed by seed, so that all settings are there early."""
    OUT.parent.mkdir(exist_ok=True)
    done = {(one["setting"], one["truth"]) for one in read(OUT)}
    for truth in range(1, seeds + 1):
        for name in names:
            if (name, truth) not in done:
                record = case(name, truth)
                with OUT.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(name, truth, f"{record['reached']:.3f} of the best with {record['chosen']}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Cases kept."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(cases: list[dict[str, Any]]) -> str:
    """The section of docs/performance.md."""
    good = [one["reached"] >= 0.95 for one in cases]
    lines = [
        f"{len(cases)} hidden machines: at least 95 % of the best goodput in {sum(good)} of them ({mean(good):.0%}), "
        f"with at most {max(one['boots'] for one in cases)} engine starts; "
        f"{sum(one['cpu_s'] for one in cases) / 60:.0f} minutes of one core, the grids included.",
        "",
        "| what limits | machines | at 95 % | median | worst | starts | engine minutes | grid as auto_tune.sh | "
        "20 random values |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in SETTINGS.items():
        rows = [one for one in cases if one["setting"] == name]
        if rows:
            lines.append(_row(setting, rows))
    return "\n".join(lines)


def _row(setting: Setting, rows: list[dict[str, Any]]) -> str:
    reached = [one["reached"] for one in rows]
    cells = [
        setting.what, len(rows), f"{mean(x >= 0.95 for x in reached):.0%}", f"{median(reached):.1%}",
        f"{min(reached):.1%}", max(one["boots"] for one in rows), f"{median(one['minutes'] for one in rows):.0f}",
    ]  # fmt: skip
    for way in ("auto_tune", "random_trials"):
        told = [one[way] for one in rows if way in one]
        values = [median(one[key] for one in told) for key in ("reached", "boots", "minutes")] if told else []
        cells.append("{:.0%}, {:.0f}, {:.0f}".format(*values) if values else "-")
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--emulator", action="store_true")
    given = parser.parse_args()
    if given.emulator:
        for name in given.settings.split(","):
            in_real_time(name, REAL_TRUTH)
    else:
        run(given.settings.split(","), given.seeds)
    text = table(read(OUT)) + "\n\n" + real_table(read(REAL))
    print(text)
    if given.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
