"""The worker process: takes a job from a pipe, runs an event loop of its own, gives its rows back."""

import asyncio
import gc
import os
import resource
import sys
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from time import monotonic, process_time
from typing import Any

from kit.loadgen.driver import Driver
from kit.loadgen.plan import Level, Target
from kit.loadgen.prompts import PromptModel
from kit.loadgen.recorder import Recorder

PROGRESS_S = 0.5


def main(descriptor: int) -> None:
    """Entry point of a worker process, given its end of the pipe; the API key stays in the environment."""
    pipe: Connection[Any, Any] = Connection(descriptor)
    run_loop(_work(pipe, *pipe.recv()))


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop; where it is missing on asyncio, which carries less, and say so."""
    try:
        from uvloop import run
    except ImportError:
        sys.stderr.write("kit: uvloop is not installed; asyncio carries fewer streams\n")
        return asyncio.run(work)
    return run(work)


async def _work(
    pipe: "Connection[Any, Any]", target: Target, level: Level, prompts: PromptModel, records: str | None
) -> None:
    recorder = Recorder(records)
    driver = Driver(target, level, prompts, recorder)
    await driver.prepare()
    gc.collect()
    gc.freeze()
    gc.disable()  # a full collection over 10,000 connections would stop the clock
    pipe.send([connection.connect_s for connection in driver.idle])
    t0 = pipe.recv()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), _orphaned, recorder)  # nothing but its end comes now
    started = process_time()
    recorder.start(t0)
    driver.start(t0)
    reports = loop.create_task(_report(pipe, driver))
    await driver.over.wait()
    own = {"cpu_s": process_time() - started, "wall_s": monotonic() - t0, "unsent_turns": driver.unsent_turns}
    reports.cancel()
    own |= {"loop_lags": driver.loop_lags, "read_lags": driver.read_lags}
    own["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loop.remove_reader(pipe.fileno())
    os.set_blocking(pipe.fileno(), True)  # the loop watched it without blocking
    pipe.send(recorder.finish() | own | recorder.counts)
    os._exit(0)  # closing 10,000 connections is the kernel's work


def _orphaned(recorder: Recorder) -> None:
    recorder.flush()
    os._exit(1)


async def _report(pipe: "Connection[Any, Any]", driver: Driver) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        pipe.send(driver.recorder.counts | {"in flight": len(driver.in_flight)})
