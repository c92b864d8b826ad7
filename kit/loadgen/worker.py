"""The worker process: a job on stdin, an event loop of its own, columns back on stdout."""

import asyncio
import gc
import os
import pickle
import resource
import struct
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from time import monotonic
from typing import Any, BinaryIO

from kit.loadgen.driver import Driver
from kit.loadgen.plan import Level, Target
from kit.loadgen.prompts import PromptModel
from kit.loadgen.recorder import Recorder

LENGTH = struct.Struct("!Q")
PROGRESS_S = 0.5


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; the API key stays in the environment."""

    target: Target
    level: Level
    prompts: PromptModel
    path: str | None  # requests.jsonl


def send_frame(stream: BinaryIO, message: Any) -> None:
    """Write one pickled message with its length."""
    data = pickle.dumps(message)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """The next message; EOFError where the other side is gone."""
    head = stream.read(LENGTH.size)
    data = stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if not data:
        raise EOFError
    return pickle.loads(data)


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop; where it is missing on asyncio, which carries less, and say so."""
    try:
        import uvloop
    except ImportError:
        sys.stderr.write("kit load: uvloop is not installed; asyncio carries fewer streams\n")
        asyncio.run(work)
        return
    uvloop.run(work)


def main() -> None:
    """Entry point of a worker process."""
    job = read_frame(sys.stdin.buffer)
    run_loop(_work(job))


async def _work(job: Job) -> None:
    recorder = Recorder(job.path)
    driver = Driver(job.target, job.level, job.prompts, recorder)
    await driver.prepare()
    connects = [connection.connect_s for connection in driver.idle]
    gc.collect()
    gc.freeze()
    gc.disable()  # a full collection over 10,000 connections would stop the clock
    send_frame(sys.stdout.buffer, {"ready": connects})
    t0 = read_frame(sys.stdin.buffer)
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), os._exit, 1)  # the parent is gone
    started = _cpu_s()
    recorder.start(t0, driver.in_flight)
    driver.start(t0)
    reports = loop.create_task(_report(driver))
    await driver.over.wait()
    spent = {"cpu_s": _cpu_s() - started, "wall_s": monotonic() - t0}
    reports.cancel()
    lags = {"loop_lags": driver.loop_lags, "read_lags": driver.read_lags}
    rest = {"unsent_turns": driver.unsent_turns, "peak_rss_bytes": _peak_rss_bytes()}
    send_frame(sys.stdout.buffer, {"result": recorder.finish() | lags | spent | rest})
    os._exit(0)  # closing 10,000 connections one by one is the kernel's work


async def _report(driver: Driver) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        counts = dict(driver.recorder.counts) | {"sent": driver.sent}
        send_frame(sys.stdout.buffer, {"progress": counts | {"in_flight": len(driver.in_flight)}})


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
