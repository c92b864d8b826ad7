"""How well the emulator keeps its own clock, and whether it schedules as the simulator does.

    python benchmarks/emulator.py [--realtime]

Starts `kit emulate` and measures it with `kit load`: a pace at 1,000 streams; then 10,000 streams at
once on 256 running rows, with the lateness that the server tells. Then sessions go through the
emulator's clock in real time, and the arrivals that it saw through the simulator. All of it shares
this machine; --realtime (Linux, root) takes a core for each process with SCHED_FIFO, so that other
work on the machine is not measured along.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from kit import catalog
from kit.emulator.clock import Clock
from kit.emulator.page import Page
from kit.emulator.text import PrefixTree, words
from kit.engine_config import EngineConfig, resolve
from kit.scheduler import Request, SchedulerConfig
from kit.simulator import COLUMNS, TICKS_PER_S, Simulation, SimulationConfig
from kit.workload import Session, Turn

KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
MODEL = ["--model", "llama-3.1-8b"]


def served(first: list[str], load: list[str], *options: str) -> tuple[dict[str, Any], list[str]]:
    """What `kit load` measured of an emulator with these options, and the emulator's own lateness."""
    command = [*first, *KIT, "emulate", *MODEL, "--gpu", "h100-sxm-80gb", "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["base_url"]  # type: ignore[union-attr]
        with tempfile.TemporaryDirectory() as out:
            asked = [*first, *KIT, "load", "--base-url", url, *MODEL, *load, "--json", "--out", str(Path(out) / "run")]
            result = json.loads(subprocess.run(asked, stdout=subprocess.PIPE, check=True, text=True).stdout)
        page = urllib.request.urlopen(url + "/metrics").read().decode()
        return result, [line for line in page.splitlines() if line.startswith("emulator_clock")]
    finally:
        process.terminate()
        process.wait()


def pace(first: list[str], ttft_ms: float, itl_ms: float) -> None:
    load = "--input-tokens 100 --output-tokens 60 --concurrency 1000 --requests 2000"
    result, _ = served(first, load.split(), "--pace", f"{ttft_ms},{itl_ms}")
    told = ((name, result[name]["p50"] * 1e3, asked) for name, asked in (("ttft_s", ttft_ms), ("itl_s", itl_ms)))
    text = ", ".join(f"{name} p50 {got:.2f} ms ({100 * (got / asked - 1):+.2f} %)" for name, got, asked in told)
    print(f"pace {ttft_ms:g},{itl_ms:g} ms, 1,000 streams, client {result['verdict']}: {text}")


def burst(first: list[str]) -> None:
    load = "--input-tokens 50 --output-tokens 64 --burst 10000"
    result, late = served(first, load.split(), "--max-num-seqs", "256")
    print(f"10,000 at once, 256 running: {result['completed']} completed in {result['duration_s']:.2f} s, "
          f"TTFT p50 {result['ttft_s']['p50']:.2f} s, client {result['verdict']}; steps by lateness:")  # fmt: skip
    print("\n".join(f"    {line}" for line in late if line[-2:] != " 0"))


@dataclass(frozen=True)
class Line:
    """Step times that keep a small machine's clock busy: one step is 6 ms and longer."""

    def step_s(self, chunks: Any, decodes: int, context: int) -> float:
        base_s, per_token_s = self.decode_line(decodes)
        return base_s + context * per_token_s + sum(new for new, _ in chunks) * 3e-6

    def decode_line(self, decodes: int) -> tuple[float, float]:
        return 0.006 + decodes * 3e-5, 3e-8


class Talk:
    """A session that sends its turns to a clock, each after the answer before and its pause."""

    def __init__(self, session: Session, clock: Clock, tree: PrefixTree) -> None:
        self.session, self.clock, self.tree = session, clock, tree
        self.text, self.requests = b"", list[Any]()
        self.over = asyncio.get_running_loop().create_future()

    def send(self) -> None:
        turn = self.session.turns[len(self.requests)]
        self.text += f"{self.session.key:04d}{len(self.requests):04d}".encode() * (turn.new_tokens // 2)
        known = self.text + words(turn.output_len, self.session.key).encode()
        key = 1000 * self.session.key + len(self.requests)
        self.requests.append(Request(key, len(self.text) // 4, turn.output_len, self.tree.path(known), self))
        self.text = known
        self.clock.submit(self.requests[-1], monotonic())

    def token(self, last: bool) -> None:
        if last and len(self.requests) == len(self.session.turns):
            self.over.set_result(None)
        elif last:
            pause_s = self.session.turns[len(self.requests) - 1].pause_after_s
            asyncio.get_running_loop().call_later(pause_s, self.send)

    def seen(self, start: float) -> Session:
        """The session with the arrivals and pauses as the clock had them."""
        pauses = [b.times[0] - a.times[3] for a, b in pairwise(self.requests)] + [0.0]
        turns = [replace(t, pause_after_s=pause_s) for t, pause_s in zip(self.session.turns, pauses, strict=True)]
        return replace(self.session, arrival_s=self.requests[0].times[0] - start, turns=turns)


async def schedule(kv_blocks: int) -> None:
    limits = SchedulerConfig(kv_blocks, max_num_seqs=24, max_num_batched_tokens=512, max_model_len=8192)
    config = resolve(EngineConfig(), catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb"))
    loop, rng, tree = asyncio.get_running_loop(), np.random.default_rng(1), PrefixTree(limits.block_size)
    real, start = Clock(limits, Line(), Page(config, "tiny", limits), loop), monotonic()
    talks = []
    for key in range(40):
        lengths = zip(rng.integers(20, 400, 3), rng.integers(5, 120, 3), rng.random(3) / 5, strict=True)
        turns = [Turn(2 * int(new), int(output), float(pause_s)) for new, output, pause_s in lengths]
        talks.append(Talk(Session(key, float(rng.random() / 5), turns), real, tree))
        loop.call_later(talks[-1].session.arrival_s, talks[-1].send)
    await asyncio.gather(*(talk.over for talk in talks))
    load = sorted((talk.seen(start) for talk in talks), key=lambda session: session.arrival_s)
    sim = Simulation(SimulationConfig(limits), Line()).run(load)
    table = np.frombuffer(sim.turns).reshape(-1, len(COLUMNS))
    requests = [request for talk in talks for request in talk.requests]
    ours = {
        "span": max(request.times[3] for request in requests) - start,
        "TTFT p50": float(np.median([request.times[2] - request.times[0] for request in requests])),
    }
    column = COLUMNS.index
    theirs = {"span": sim.now / TICKS_PER_S,
              "TTFT p50": float(np.median(table[:, column("first_s")] - table[:, column("arrival_s")]))}  # fmt: skip
    other = sim.replicas[0].scheduler
    text = ", ".join(f"{name} {ours[name]:.4f} / {theirs[name]:.4f} s" for name in ours)
    counts = ((name, getattr(real.scheduler, name), getattr(other, name)) for name in ("preemptions", "hit_tokens"))
    print(f"{kv_blocks} blocks, clock / simulator: " + ", ".join(f"{n} {a} / {b}" for n, a, b in counts) + ", " + text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--realtime", action="store_true", help="SCHED_FIFO for every process")
    first = ["chrt", "--fifo", "10"] if options.parse_args().realtime else []
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    pace(first, 300, 50)
    pace(first, 500, 100)
    burst(first)
    if first:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    for kv_blocks in (2000, 800, 500):
        asyncio.run(schedule(kv_blocks))


if __name__ == "__main__":
    main()
