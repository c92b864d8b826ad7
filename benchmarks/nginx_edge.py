"""What a bundle's nginx costs and keeps: added time to the first token, 10,000 streams, reloads, the split of sessions.

    python benchmarks/nginx_edge.py [--streams 10000] [--balance sticky-round-robin] [--realtime] [--write | --json]

Four paced servers (benchmarks/paced_server.c, needs cc) stand behind the nginx of a rendered single-node
bundle, started as its container would start it; `kit load` measures them directly and through it. All of
it shares this machine; --realtime (Linux, root) puts every part before other work with SCHED_FIFO.
--write keeps the table in docs/performance.md.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from kit.deploy import Source, render
from kit.deploy.stage import Stage, stage
from kit.engines.launch import free_port
from kit.scenario import load as load_scenario

ROOT = Path(__file__).resolve().parents[1]
KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
KEY, MODEL, SERVERS, PACE_MS = "KIT_EDGE_KEY", "llama-3.1-8b", 4, (200, 200)
OPEN = {"connections_per_key": 20_000, "requests_per_s_per_key": 20_000, "worker_processes": 2}
BEGIN, END = "<!-- nginx edge: begin -->", "<!-- nginx edge: end -->"


def bundle(folder: Path, balance: str) -> Path:
    """A single-node bundle with four engines and limits that the load stays below."""
    source = Source(load_scenario("burst-10000"), "h100-sxm-80gb")
    render(source, "single-node", folder)
    values = yaml.safe_load((folder / "values.yaml").read_text())
    values["pools"]["main"] |= {"replicas": SERVERS, "gpu_count": 1}
    values["pools"]["main"]["flags"]["tensor_parallel_size"] = 1
    values["edge"] |= OPEN | {"balance": balance}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    render(source, "single-node", folder)
    return folder


def load(first: list[str], url: str, *options: str) -> dict[str, Any]:
    """What kit load says of a server."""
    command = [*first, *KIT, "load", "--base-url", url, "--model", MODEL, "--input-tokens", "100", *options, "--json"]
    if KEY in os.environ:
        command += ["--api-key-env", KEY]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def added(first: list[str], direct: str, made: Stage, runs: int) -> dict[str, Any]:
    """Median TTFT p50 at 1,000 open streams, 100 new ones a second, without and with nginx, alternating."""
    asked = ("--request-rate", "100", "--duration", "20", "--output-tokens", "50")
    pairs = [(load(first, direct, *asked), load(first, made.base_url, *asked)) for _ in range(runs)]
    ttft_ms = [[1e3 * one["ttft_s"]["p50"] for one in column] for column in zip(*pairs, strict=True)]
    verdicts = sorted({one["verdict"] for pair in pairs for one in pair})
    alone, through = map(median, ttft_ms)
    peak = min(one["peak_in_flight"] for pair in pairs for one in pair)
    return {"peak": peak, "direct_ms": alone, "through_ms": through, "added_ms": through - alone, "verdicts": verdicts}


def reloaded(first: list[str], made: Stage) -> dict[str, Any]:
    """1,000 streams of ten seconds, while nginx reads its configuration again three times."""
    times: list[float] = []

    def again() -> None:
        for _ in range(3):
            time.sleep(2)
            made.reload()
            times.append(time.monotonic())

    other = threading.Thread(target=again)
    other.start()
    found = load(first, made.base_url, "--burst", "1000", "--output-tokens", "50")
    other.join()
    return {"completed": found["completed"], "failed": found["failed"], "reloads": len(times)}


def split(urls: list[str], made: Stage) -> list[int]:
    """How 200 sessions fall on the servers, one request each."""

    def counts() -> list[int]:
        pages = [urllib.request.urlopen(url + "/metrics").read().decode() for url in urls]
        return [int(float(re.search(r"requests\S* (\S+)", page)[1])) for page in pages]  # type: ignore[index]

    before, body = counts(), {"model": MODEL, "max_tokens": 1, "stream": True, "messages": []}
    for number in range(200):
        head = {"Authorization": f"Bearer {made.key}", "X-Session-Id": f"{number:08x}-agent"}
        request = urllib.request.Request(made.base_url + "/v1/chat/completions", json.dumps(body).encode(), head)
        urllib.request.urlopen(request).read()
    return [after - earlier for after, earlier in zip(counts(), before, strict=True)]


def measured(streams: int, first: list[str], runs: int, balance: str) -> dict[str, Any]:
    """Everything, from servers that are started and stopped here."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, servers = Path(scratch), list[subprocess.Popen[bytes]]()
        server = folder / "paced_server"
        subprocess.run(["cc", "-O2", "-o", server, ROOT / "benchmarks" / "paced_server.c"], check=True)
        ports = [free_port() for _ in range(SERVERS)]
        try:
            servers += [subprocess.Popen([*first, server, str(port), *map(str, PACE_MS)]) for port in ports]
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            addresses = {f"engine-{n}:8000": f"127.0.0.1:{port}" for n, port in enumerate(ports)}
            with stage(bundle(folder / "bundle", balance), addresses, folder / "stage") as made:
                if first:
                    group = os.getpgid(made.parts["edge"].process.pid)
                    pids = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split()
                    for pid in pids:
                        subprocess.run(["chrt", "-f", "-p", "1", pid], check=False)
                os.environ[KEY] = made.key
                found: dict[str, Any] = {"added": added(first, urls[0], made, runs), "reload": reloaded(first, made)}
                wave = load(first, made.base_url, "--burst", str(streams), "--output-tokens", "50")
                kept = ("sent", "completed", "failed", "failures", "peak_in_flight", "ttft_s", "verdict", "duration_s")
                found["balance"] = balance
                return found | {"streams": {name: wave[name] for name in kept}, "split": split(urls, made)}
        finally:
            for one in servers:
                one.terminate()
                one.wait()


def text(found: dict[str, Any], realtime: bool) -> str:
    """The section of docs/performance.md."""
    wave, first, again = found["streams"], found["added"], found["reload"]
    fullest = max(found["split"]) / (sum(found["split"]) / SERVERS)
    before = ", with real-time priority over other work" if realtime else ""
    rows = [
        (
            f"TTFT p50 at up to {first['peak']:,} open streams, 100 new ones a second, directly",
            f"{first['direct_ms']:.2f} ms",
        ),
        ("... through nginx", f"{first['through_ms']:.2f} ms, {first['added_ms']:+.2f} ms"),
        (f"{wave['sent']:,} streams at once", f"{wave['completed']:,} complete, {wave['failed']} failed"),
        ("... open at the same time, TTFT p50", f"{wave['peak_in_flight']:,}, {1e3 * wave['ttft_s']['p50']:.0f} ms"),
        (
            f"1,000 streams during {again['reloads']} reloads",
            f"{again['completed']:,} complete, {again['failed']} failed",
        ),
        (
            f"200 sessions, {found['balance']}",
            f"{' / '.join(map(str, found['split']))}, busiest over mean {fullest:.2f}",
        ),
    ]
    head = f"Measured on {datetime.date.today()}, four paced servers (TTFT {PACE_MS[0]} ms), nginx with two workers "
    head += f"and the client on 2 cores{before}, load average {os.getloadavg()[2]:.1f} over 15 minutes. Client: "
    head += f"{', '.join(first['verdicts'])} at 1,000 streams, {wave['verdict']} at {wave['sent']:,}.\n"
    return "\n".join([head, "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--balance", default="consistent-hash", choices=["consistent-hash", "sticky-round-robin"])
    for flag in ("--realtime", "--write", "--json"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    result = measured(options.streams, ["chrt", "-f", "1"] if options.realtime else [], options.runs, options.balance)
    if options.json:
        print(json.dumps(result))
    else:
        print(section := text(result, options.realtime))
    if options.write:
        page = ROOT / "docs" / "performance.md"
        old = page.read_text()
        begin, end = old.index(BEGIN) + len(BEGIN), old.index(END)
        page.write_text(f"{old[:begin]}\n{section}\n{old[end:]}")
