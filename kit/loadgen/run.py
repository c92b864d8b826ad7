"""The parent of a run: descriptors, workers, one clock for all, progress, resume by level."""

import json
import os
import resource
import selectors
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, cast

from kit.errors import UserError
from kit.loadgen.plan import STREAMS_PER_WORKER, Level, Target
from kit.loadgen.probe import calibrate
from kit.loadgen.prompts import PromptModel
from kit.loadgen.summary import summarize_level
from kit.loadgen.watch import ServerWatch
from kit.loadgen.worker import Job, read_frame, send_frame

DESCRIPTORS_BESIDE = 64  # files, pipes and the loop's own
START_DELAY_S = 0.1  # from "go" to the first scheduled time
POLL_S = 1.0


def _tell(line: str) -> None:
    sys.stderr.write(line)


@dataclass(frozen=True)
class Options:
    """How a run is measured, apart from what is sent."""

    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    workers: int | None = None
    metrics_url: str | None = None
    log: Callable[[str], None] = _tell


def measure(
    target: Target,
    levels: list[Level],
    options: Options,
    out: Path | None = None,
    config: dict[str, Any] | None = None,
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
    summaries, ready = [], None
    for level in levels:
        folder = out if out is None or len(levels) == 1 else out / level.name
        done = folder / "summary.json" if folder else None
        if done is not None and done.exists():
            options.log(f"{level.name}: already measured, taken from {done}\n")
            summaries.append(json.loads(done.read_text(encoding="utf-8")))
            continue
        ready = ready or calibrate(target, int.from_bytes(os.urandom(8)))
        path = _fresh_records(folder) if folder else None
        summary = _run_level(ready[0], level, ready[1], options, path)
        summary["warnings"] = [*ready[2], *summary["warnings"]]
        if done is not None:
            _write_json(done, summary)
        summaries.append(summary)
    return summaries


def _claim(out: Path, config: dict[str, Any]) -> None:
    """Write config.json; refuse a folder that holds a run with another configuration."""
    out.mkdir(parents=True, exist_ok=True)
    held = out / "config.json"
    if held.exists():
        other = json.loads(held.read_text(encoding="utf-8"))
        differs = sorted(key for key in {*other, *config} if other.get(key) != config.get(key))
        if differs:
            raise UserError(f"--out {out} holds a run with another {', '.join(differs)}")
    _write_json(held, config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _fresh_records(folder: Path) -> Path:
    """requests.jsonl of a new attempt; the records of an interrupted one are kept beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "requests.jsonl"
    if path.exists():
        attempt = len(list(folder.glob("requests.interrupted-*.jsonl"))) + 1
        path.rename(folder / f"requests.interrupted-{attempt}.jsonl")
    return path


def _run_level(
    target: Target, level: Level, prompts: PromptModel, options: Options, path: Path | None
) -> dict[str, Any]:
    workers = _workers(level, options)
    gpu_log = path.with_name("gpu.jsonl") if path else None
    watch = ServerWatch(options.metrics_url or _metrics_url(target), gpu_log)
    crew = [
        _Worker(Job(target, share, prompts, str(path) if path else None))
        for share in level.deal(workers)
    ]
    try:
        connects = [worker.ready() for worker in crew]
        t0 = monotonic() + START_DELAY_S
        for worker in crew:
            worker.send(t0)
        _follow(crew, level, watch, options.log)
    finally:
        for worker in crew:
            worker.stop()
    watch.poll()
    results = [worker.result for worker in crew]
    lost = sum(len(worker.job.level.sessions) for worker in crew if worker.result is None)
    limits = options.slo_ttft_s, options.slo_tpot_s
    return summarize_level(level, results, connects, lost, watch, limits)


def _workers(level: Level, options: Options) -> int:
    """Processes for a level; one core is left to others, and no worker is without a stream."""
    streams = level.streams()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    enough = min(max(1, (cores or 1) - 1), ceil(streams / STREAMS_PER_WORKER))
    return max(1, min(options.workers or enough, streams))


def _metrics_url(target: Target) -> str:
    return target.base_url.rstrip("/").removesuffix("/v1") + "/metrics"


def _raise_descriptors(level: Level, options: Options) -> None:
    """Raise the soft limit of open files to the hard one, which must suffice for the level."""
    need = ceil(level.streams() / _workers(level, options)) + DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UserError(
            f"{need} open files needed per worker, the hard limit is {hard}; raise it with "
            f"`sudo prlimit --pid $$ --nofile={need}:{need}` (in a container: --ulimit "
            f"nofile={need}), or spread the streams with --workers"
        )
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Worker:
    """One worker process and the pipes to it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.result: dict[str, Any] | None = None
        self.progress: dict[str, int] = {}
        command = [sys.executable, "-c", "from kit.loadgen.worker import main; main()"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.stdin = cast(BinaryIO, self.process.stdin)
        self.stdout = cast(BinaryIO, self.process.stdout)
        self.send(job)

    def send(self, message: Any) -> None:
        send_frame(self.stdin, message)

    def ready(self) -> list[float]:
        """Wait until requests and connections are ready; the seconds that each connect took."""
        try:
            connects: list[float] = read_frame(self.stdout)["ready"]
        except EOFError:
            raise RuntimeError("a load worker ended before its start; its error is above") from None
        return connects

    def read(self) -> bool:
        """Take one message; false when there will be no more."""
        try:
            message = read_frame(self.stdout)
        except EOFError:
            return False
        self.progress = message.get("progress", self.progress)
        self.result = message.get("result")
        return self.result is None

    def stop(self) -> None:
        """End the process: closing its stdin is enough while its loop runs."""
        self.stdin.close()
        if self.result is None:
            self.process.kill()
        self.process.wait()
        self.stdout.close()


def _follow(
    crew: list[_Worker], level: Level, watch: ServerWatch, log: Callable[[str], None]
) -> None:
    """Collect messages until every worker has given its result; poll the server; tell progress."""
    started = polled = monotonic()
    with selectors.DefaultSelector() as selector:
        for worker in crew:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        while selector.get_map():
            for key, _ in selector.select(POLL_S):
                if not key.data.read():
                    selector.unregister(key.fileobj)
            if monotonic() - polled >= POLL_S:
                polled = monotonic()
                watch.poll()
                log(_progress(level, crew, polled - started))


def _progress(level: Level, crew: list[_Worker], elapsed_s: float) -> str:
    names = ("sent", "completed", "failed", "in_flight")
    sums = {name: sum(worker.progress.get(name, 0) for worker in crew) for name in names}
    return (
        f"{level.name} {elapsed_s:5.0f} s  " + "  ".join(f"{k} {v}" for k, v in sums.items()) + "\n"
    )
