"""From probes to a calibration: what was measured is kept as it comes, and a second start goes on from there."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kit.calibrate.file import Calibration
from kit.calibrate.fit import OWN, Fit, play
from kit.calibrate.probes import Measured, plan
from kit.calibrate.server import Server
from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError
from kit.scheduler import SchedulerConfig
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig, replica
from kit.steptime import StepTime, fitted, work
from kit.workload import Session, Turn

BUDGET_S = 600.0
SATURATED = 1.1  # a rung that gives less than this many times the tokens of the one before is the last
CPU_FAR = 10.0  # how much farther an engine without a GPU may be from a GPU's coefficients
Log = Callable[[str], object]


def calibrate(
    model: ModelSpec, gpu: GpuSpec, config: EngineConfig, server: Server, *, out: Path | None = None,
    budget_s: float = BUDGET_S, on_cpu: bool = False, log: Log = sys.stderr.write,
) -> Calibration:  # fmt: skip
    """Probe the server for about `budget_s` of its time and fit; `out` and the probes beside it are written.

    Raises UserError where `out` cannot be written, or the server is of another engine or goes away.
    """
    check_out(out, budget_s)
    if server.engine not in (None, config.engine):
        raise UserError(f"the server's metrics are those of {server.engine}, not of --engine {config.engine}")
    limits, _, _ = replica(model, gpu, config)
    known = limits.kv_blocks * limits.block_size
    tokens, longest = server.kv_cache_tokens or known, server.max_model_len or limits.max_model_len
    limits = replace(
        limits, kv_blocks=int(tokens // limits.block_size), max_model_len=min(longest, limits.max_model_len)
    )
    resolved = resolve(config, model, gpu)
    of: dict[str, Any] = {"model": model.key, "gpu": gpu.key, "config": asdict(config)}
    prior = fitted(model, gpu, resolved).coefficients
    steps = StepTime(work(model, gpu, resolved), OWN | dict(prior))
    probes = _probe(server, limits, steps, budget_s, *_kept(out, {**of, "budget_s": budget_s}, log), log)
    fit = Fit(steps.work, prior, limits, probes, CPU_FAR if on_cpu else 1.0)
    roots = fit.solve()
    factors, on = fit.factors_90(roots), "emulator" if server.kind != "live" else "cpu" if on_cpu else "gpu"
    found = Calibration(
        **of, date=datetime.now(UTC).date().isoformat(), measured_on=on, coefficients=fit.coefficients(roots),
        kv_cache_factor=tokens / known, kv_cache_tokens=server.kv_cache_tokens, ttft_factor_90=factors["ttft_s"],
        tpot_factor_90=factors["tpot_s"], probes=fit.table(roots), probe_s=sum(one.duration_s for one in probes),
    )  # fmt: skip
    if out is not None:
        found.save(out)
    return found


def check_out(out: Path | None, budget_s: float) -> None:
    """Refuses a budget of nothing and a file that cannot be written, before anything is measured."""
    if not 0 < budget_s < float("inf"):
        raise UserError(f"--budget-s must be above 0, got {budget_s:g}")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out {out}: " + ("is a folder" if out.is_dir() else f"there is no folder {out.parent}"))


def _kept(out: Path | None, asked: dict[str, Any], log: Log) -> tuple[Path | None, list[Measured]]:
    """The file of probes beside the calibration's, a JSON line each, and those of an interrupted start in it."""
    if out is None:
        return None, []
    path, held = out.with_name(f"{out.name}.probes.jsonl"), list[Any]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):  # the last one may have been cut off
            held.append(json.loads(line))
    goes_on = held[:1] == [asked] and not out.exists()
    if held and not goes_on:
        path.rename(out.with_name(f"{out.name}.probes.until-{time.time_ns()}.jsonl"))
    held = held if goes_on else [asked]
    path.write_text("".join(json.dumps(one) + "\n" for one in held), encoding="utf-8")
    log(f"{len(held) - 1} probes were measured before: {path}\n" if goes_on else "")
    return path, [Measured(**one) for one in held[1:]]


def _probe(
    server: Server, limits: SchedulerConfig, steps: StepTime, budget_s: float, path: Path | None, kept: list[Measured],
    log: Log,
) -> list[Measured]:  # fmt: skip
    """Every probe, measured now or kept from before; the ladder ends where more streams give no more tokens."""
    probes, slower, best = list[Measured](), 1.0, 0.0  # slower than the prior; tokens per s of the last rung

    def cost_s(streams: int, prompt: int, output: int) -> float:
        each = [Session(key, 0.0, [Turn(prompt, output)]) for key in range(streams)]
        return slower * Simulation(SimulationConfig(limits), steps).run(each).now / TICKS_PER_S

    for level in plan(limits, budget_s, cost_s):
        rung = level.name.startswith("streams")
        if rung and best < 0:
            continue
        one = next((one for one in kept if one.name == level.name), None)
        if one is None:
            log(f"probe {level.name}: {len(level.sessions)} sessions\n")
            one = server.measure(level)
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
        probes.append(one)
        if one.told["verdict"] != "VALID" or one.told.get("failures"):
            log(f"probe {one.name}: {'; '.join(one.told['verdict_reasons'])} failed: {one.told['failures']}\n")
        if one.told.get("waiting") and (one.told["running"] or 0) < min(one.slots or 0, limits.max_num_seqs):
            log(f"probe {one.name}: {one.told['running']:g} ran at most, others waited: what is its --max-num-seqs?\n")
        for quantity, (seen, _) in play(one, one.chains(), limits, steps).items():
            slower = max(slower, float((one.frame[quantity] / seen).fillna(1.0).median()))
        rate = sum(one.rows["output_tokens"]) / one.duration_s
        best = best if not rung else rate if rate > SATURATED * best else -1.0
    return probes
