"""The parent of a run: descriptors, workers, one clock for all, progress, resume by level."""

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

from kit.catalog.paths import write_json
from kit.errors import UserError
from kit.loadgen.plan import STREAMS_PER_WORKER, Level, Target
from kit.loadgen.probe import calibrate
from kit.loadgen.prompts import PromptModel
from kit.loadgen.summary import summarize_level
from kit.loadgen.watch import ServerWatch

DESCRIPTORS_BESIDE = 64  # files, pipes and the loop's own
START_DELAY_S = 0.1  # from "go" to the first scheduled time
POLL_S, TELL_S = 0.5, 2.0


@dataclass(frozen=True)
class Options:
    """How a run is measured, apart from what is sent."""

    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    workers: int | None = None
    metrics_url: str | None = None
    log: Callable[[str], object] = sys.stderr.write


def measure(
    target: Target, levels: list[Level], options: Options, out: Path | None = None, config: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Summaries of the levels, in order, each with all keys of `kit load --json`.

    With `out`, records and summaries are kept there and a level that has its summary is not run
    again. Raises UserError where nothing listens, the request is refused as such, `out` holds a
    run with another `config`, or the descriptors do not suffice.
    """
    for level in levels:
        _raise_descriptors(level, options)
    if out is not None:
        _claim(out, config or {})
    summaries, probed = [], None
    system = any(session.shared_prefix_tokens for level in levels for session in level.sessions)
    for level in levels:
        folder = out if out is None or len(levels) == 1 else out / level.name
        done = folder / "summary.json" if folder else None
        if done and done.exists():
            options.log(f"{level.name}: already measured, taken from {done}\n")
            summaries.append(json.loads(done.read_text(encoding="utf-8")))
            continue
        target, prompts, warnings = probed = probed or calibrate(target, int.from_bytes(os.urandom(8)), system)
        summary = _run_level(target, level, prompts, options, _fresh_records(folder) if folder else None)
        summary["warnings"] = warnings + summary["warnings"]
        try:
            if done:
                write_json(done, summary)
        except OSError as error:
            summary["warnings"].append(f"{done} is not written: {error.strerror}; the level will be measured again")
        summaries.append(summary)
    return summaries


def _claim(out: Path, config: dict[str, Any]) -> None:
    """Write config.json; refuse a folder that holds a run with another configuration."""
    held = out / "config.json"
    if held.exists():
        other = json.loads(held.read_text(encoding="utf-8"))
        differs = sorted(key for key in {*other, *config} if other.get(key) != config.get(key))
        if differs:
            raise UserError(f"--out {out} holds a run with another {', '.join(differs)}")
    try:
        write_json(held, config)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


def _fresh_records(folder: Path) -> Path:
    """requests.jsonl of a new attempt; the records of an interrupted one are kept beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "requests.jsonl"
    if path.exists():
        attempt = len(list(folder.glob("requests.interrupted-*.jsonl"))) + 1
        path.rename(folder / f"requests.interrupted-{attempt}.jsonl")
    return path


def _run_level(
    target: Target, level: Level, prompts: PromptModel, options: Options, records: Path | None
) -> dict[str, Any]:
    watch = ServerWatch(options.metrics_url or target.root + "/metrics")
    path = str(records) if records else None
    crew = [_Worker(target, share, prompts, path) for share in level.deal(_workers(level, options))]
    try:
        connects = [seconds for worker in crew for seconds in worker.pipe.recv()]
        t0 = monotonic() + START_DELAY_S
        for worker in crew:
            worker.pipe.send(t0)
        _follow(crew, level, watch, options.log)
    except EOFError:
        raise RuntimeError("a load worker ended before its start; its error is above") from None
    finally:
        for worker in crew:
            worker.stop()
    watch.poll()
    results = [worker.told for worker in crew if worker.finished]
    lost = sum(worker.requests for worker in crew if not worker.finished)
    summary = summarize_level(level, results, connects, lost, watch, (options.slo_ttft_s, options.slo_tpot_s))
    if unwritten := sum(result["unwritten"] for result in results):
        summary["warnings"].append(f"{records}: the disk did not take the last {unwritten} records")
    if options.metrics_url and not watch.exposed:
        summary["warnings"].append(f"--metrics-url {options.metrics_url}: no known metric there")
    return summary


def _workers(level: Level, options: Options) -> int:
    """Processes for a level; one core is left to others, and no worker is without a stream."""
    streams = level.streams()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    enough = min(max(1, (cores or 1) - 1), ceil(streams / STREAMS_PER_WORKER))
    return max(1, min(options.workers or enough, streams))


def _raise_descriptors(level: Level, options: Options) -> None:
    """Raise the soft limit of open files to the hard one, which must suffice for the level."""
    need = ceil(level.streams() / _workers(level, options)) + DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UserError(
            f"{level.name} needs {need} open files per worker, the hard limit is {hard}; raise it "
            f"with `sudo prlimit --pid $$ --nofile={need}:{need}` (in a container: --ulimit "
            f"nofile={need}), or spread the streams with --workers"
        )
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, target: Target, share: Level, prompts: PromptModel, records: str | None) -> None:
        self.requests = len(share.sessions)
        self.told: dict[str, Any] = {}  # its last message: progress, or in the end the result
        self.pipe, other = multiprocessing.Pipe()
        code = f"from kit.loadgen.worker import main; main({other.fileno()})"
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[other.fileno()], start_new_session=True, env=os.environ | one_thread
        )
        other.close()
        self.pipe.send((target, share, prompts, records))

    @property
    def finished(self) -> bool:
        return "rows" in self.told

    def read(self) -> bool:
        """Take one message; false when there will be no more."""
        try:
            self.told = self.pipe.recv()
        except (EOFError, OSError):
            return False
        return not self.finished

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if not self.finished:
            self.process.kill()
        self.process.wait()
        self.pipe.close()


def _follow(crew: list[_Worker], level: Level, watch: ServerWatch, log: Callable[[str], object]) -> None:
    """Collect messages until every worker has given its result; poll the server; tell progress."""
    started = polled = told = monotonic()
    busy: dict[Any, _Worker] = {worker.pipe: worker for worker in crew}
    while busy:
        for pipe in multiprocessing.connection.wait(list(busy), POLL_S):
            if not busy[pipe].read():
                del busy[pipe]
        if monotonic() - polled >= POLL_S:
            polled = monotonic()
            watch.poll()
        if monotonic() - told >= TELL_S:
            told = monotonic()
            names = ("in flight", "completed", "failed")
            sums = [f"{name} {sum(worker.told.get(name, 0) for worker in crew)}" for name in names]
            log(f"{level.name} {told - started:5.0f} s  {'  '.join(sums)}\n")
