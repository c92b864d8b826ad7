"""What kit record adds to the first token, and how true a replay is.

Two proofs against `kit emulate` on this machine. Overhead: the same streamed requests, alternately straight to the
server and through the proxy, over connections that stay open. Replay: the recording in data/workloads/agents.jsonl
(or --recording FILE) is played by `kit load` at 1 to 1,000 times its speed, and each gap, token count and call is
compared with the recorded one.

    .venv/bin/python benchmarks/record_replay.py [--realtime] [--write]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from kit import workload
from kit.workload import Session

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/performance.md"
KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
MODEL, GPU = "llama-3.1-8b", "h100-sxm-80gb"
REALTIME = ["chrt", "--fifo", "1"]
SIZES = (("300 tokens", 300), ("8,000 tokens", 8_000), ("100,000 tokens", 100_000))
SPEEDS = (1, 10, 100, 1000)


@contextmanager
def started(first: list[str], *arguments: str) -> Iterator[str]:
    """A kit server: its base URL."""
    command = [*first, *KIT, *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def ttft_s(connection: HTTPConnection, body: bytes) -> float:
    """Seconds from the send to the first token of one streamed answer."""
    begun = perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer, first = connection.getresponse(), 0.0
    while line := answer.readline():
        if not first and b'"content": "' in line and b'"content": ""' not in line:
            first = perf_counter() - begun
    return first


def overhead(first: list[str], folder: Path, rounds: int) -> list[str]:
    """Rows of the table: TTFT straight and through the proxy."""
    rows = []
    with ExitStack() as stack:
        server = stack.enter_context(started(first, "emulate", "--model", MODEL, "--gpu", GPU, "--pace", "20,1"))
        out = str(folder / "overhead.jsonl")
        proxy = stack.enter_context(started(first, "record", "--upstream", server, "--out", out))
        ways = [HTTPConnection(urlsplit(url).netloc) for url in (server, proxy)]
        for name, tokens in SIZES:
            asked = {"messages": [{"role": "user", "content": "word" * tokens}], "max_tokens": 4}
            body = json.dumps({**asked, "stream": True, "ignore_eos": True}).encode()
            seen = np.array([[ttft_s(way, body) for way in ways] for _ in range(rounds + 5)])[5:] * 1e3
            (a50, b50), (a99, b99) = np.percentile(seen, (50, 99), axis=0)
            rows.append(f"| {name} | {a50:.2f} | {b50:.2f} | **{b50 - a50:.2f}** | {a99:.2f} | {b99:.2f} |")
    return rows


def planned(session: Session, key: str, speed: float) -> Iterator[tuple[str, int, str, int, float, int, int]]:
    """Every turn of a session: its key, what it follows, the gap from there, prompt and answer tokens."""
    for index, (turn, input_len) in enumerate(zip(session.turns, session.input_lens(), strict=True)):
        before = session.turns[index - 1] if index else None
        if before is not None and not before.children:
            yield key, index, key, index - 1, before.pause_after_s / speed, input_len, turn.output_len
        else:  # a first turn, or one that waits for children: no single gap
            yield key, index, "", 0, float("nan"), input_len, turn.output_len
        for child in turn.children:
            lines = list(planned(child, f"{key}.{child.key}", speed))
            yield (lines[0][0], 0, key, index, child.arrival_s / speed, *lines[0][5:])
            yield from lines[1:]


def replay(first: list[str], server: str, recording: Path, speed: int, sessions: int, out: Path) -> str:
    """A row of the table: how one replay differs from what it plays."""
    preset = workload.load(str(recording))
    turns = [
        row for one in workload.generate(preset, 0, sessions=sessions) for row in planned(one, str(one.key), speed)
    ]
    command = [*first, *KIT, "load", "--base-url", server, "--model", MODEL, "--workload", str(recording), "--json"]
    command += ["--speed", str(speed), "--requests", str(sessions), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    got: dict[str, Any] = json.loads(done.stdout)
    sent = {(row["session"], row["turn"]): row for row in map(json.loads, (out / "requests.jsonl").open())}
    prompts = [sent[row[:2]]["prompt_tokens"] / row[5] - 1 for row in turns]
    answers = [sent[row[:2]]["output_tokens"] / row[6] - 1 for row in turns]
    gaps = [sent[row[:2]]["sent_s"] - sent[row[2:4]]["end_s"] - row[4] for row in turns if row[2]]
    off = np.abs(np.array(gaps)) * 1e3
    total = sum(sent[row[:2]]["prompt_tokens"] for row in turns) / sum(row[5] for row in turns) - 1
    return (
        f"| {speed:,}x | {sessions} | {len(turns)} / {got['sent']} / {got['completed']} | {total:+.2%} | "
        f"{np.abs(prompts).max():.2%} | {np.abs(answers).max():.2%} | {len(off)} | "
        f"{np.percentile(off, 50):.2f} / {np.percentile(off, 99):.2f} / {off.max():.2f} | {got['verdict']} |"
    )


def text(overheads: list[str], replays: list[str], realtime: bool) -> str:
    """What goes into docs/performance.md."""
    load, cores = os.getloadavg()[2], len(os.sched_getaffinity(0))
    priority = "; all had real-time priority (chrt -f 1) over the other work" if realtime else ""
    heads = (
        ("prompt", "TTFT p50, ms: straight", "through the proxy", "added", "p99, ms: straight", "through the proxy"),
        ("speed", "sessions", "calls planned / sent / answered", "prompt tokens, all", "worst prompt", "worst answer",
         "gaps", "gap off by, p50 / p99 / max, ms", "client"),
    )  # fmt: skip
    when = datetime.now(UTC).date()
    lines = [f"Measured on {when}, all on {cores} cores, load average {load:.1f} over 15 minutes{priority}."]
    for head, rows in zip(heads, (overheads, replays), strict=True):
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--realtime", action="store_true", help="SCHED_FIFO for every process")
    options.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--sessions", type=int, default=100)
    options.add_argument("--recording", type=Path, default=ROOT / "data/workloads/agents.jsonl")
    asked = options.parse_args()
    first = REALTIME if asked.realtime else []
    if first:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overheads = overhead(first, folder, asked.rounds)
        replays = []
        with started(first, "emulate", "--model", MODEL, "--gpu", GPU) as server:
            for speed in SPEEDS:
                count = 4 if speed == 1 else asked.sessions  # as recorded, then many
                replays.append(replay(first, server, asked.recording, speed, count, folder / str(speed)))
    found = text(overheads, replays, asked.realtime)
    print(found)
    if asked.write:
        head, _, rest = PAGE.read_text().partition("<!-- record -->\n")
        PAGE.write_text(f"{head}<!-- record -->\n{found}\n<!-- /record -->{rest.partition('<!-- /record -->')[2]}")


if __name__ == "__main__":
    main()
