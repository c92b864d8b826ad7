"""The worker process: takes a job from a pipe, runs an event loop of its own, gives columns back."""

import asyncio
import gc
import os
import resource
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from kit.loadgen.driver import Driver
from kit.loadgen.plan import Level, Target
from kit.loadgen.prompts import PromptModel
from kit.loadgen.recorder import Recorder

PROGRESS_S = 0.5


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; the API key stays in the environment."""

    target: Target
    level: Level
    prompts: PromptModel
    path: str | None  # requests.jsonl


def main(descriptor: int) -> None:
    """Entry point of a worker process, given its end of the pipe."""
    pipe: Connection[Any, Any] = Connection(descriptor)
    run_loop(_work(pipe, pipe.recv()))


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop; where it is missing on asyncio, which carries less, and say so."""
    try:
        import uvloop
    except ImportError:
        sys.stderr.write("kit load: uvloop is not installed; asyncio carries fewer streams\n")
        asyncio.run(work)
        return
    uvloop.run(work)


async def _work(pipe: "Connection[Any, Any]", job: Job) -> None:
    recorder = Recorder(job.path)
    driver = Driver(job.target, job.level, job.prompts, recorder)
    await driver.prepare()
    gc.collect()
    gc.freeze()
    gc.disable()  # a full collection over 10,000 connections would stop the clock
    pipe.send([connection.connect_s for connection in driver.idle])
    t0 = pipe.recv()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), _orphaned, recorder)  # nothing but its end comes now
    started = _cpu_s()
    recorder.start(t0)
    driver.start(t0)
    reports = loop.create_task(_report(pipe, driver))
    await driver.over.wait()
    own = {"cpu_s": _cpu_s() - started, "wall_s": monotonic() - t0}
    reports.cancel()
    own |= {"loop_lags": driver.loop_lags, "read_lags": driver.read_lags}
    own |= {"unsent_turns": driver.unsent_turns, "peak_rss_bytes": _usage().ru_maxrss * 1024}
    loop.remove_reader(pipe.fileno())
    os.set_blocking(pipe.fileno(), True)  # the loop watched it without blocking
    pipe.send(recorder.finish() | own)
    os._exit(0)  # closing 10,000 connections is the kernel's work


def _orphaned(recorder: Recorder) -> None:
    recorder.flush()
    os._exit(1)


async def _report(pipe: "Connection[Any, Any]", driver: Driver) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        counts = driver.recorder.counts | {"sent": driver.sent}
        pipe.send({"progress": counts | {"in flight": len(driver.in_flight)}})


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def _cpu_s() -> float:
    return _usage().ru_utime + _usage().ru_stime
