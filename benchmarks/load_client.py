"""What the load generator measures of a server whose times are known, sharing its machine.

    python benchmarks/load_client.py [--repeats 3] [--poisson-s 600] [--write]

Compiles benchmarks/paced_server.c, runs bursts of 100, 1,000 and 10,000 streams, a load that no
two cores carry, and a Poisson rate; with --write the tables go into docs/performance.md between
its markers. Beside them `vllm bench serve`, where `vllm` is installed and KIT_TOKENIZER names a
tokenizer for it.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.loadgen import Options, Target, fixed_sessions, level, measure

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- load client: begin -->", "<!-- load client: end -->"
INPUT_TOKENS, OUTPUT_TOKENS, TTFT_S = 100, 50, 0.2
BURSTS = ((100, 0.020), (1_000, 0.050), (10_000, 0.200))
TOO_MUCH = (10_000, 0.020)
POISSON_RATE_PER_S = 20.0
MEASURED = (
    "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "send_lag_p99_s", "events_per_cpu_s", "peak_rss_bytes"
)  # fmt: skip


@contextlib.contextmanager
def paced_server(binary: Path, itl_s: float) -> Iterator[str]:
    """A fresh server on a free port, stopped by its process id."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [str(binary), str(port), str(TTFT_S * 1e3), str(itl_s * 1e3)]
    process = subprocess.Popen(command)
    time.sleep(0.3)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def burst(base_url: str, streams: int) -> dict[str, Any]:
    """One burst: the figures of the table."""
    before = children_cpu_s()
    plan = level("burst", streams, fixed_sessions(INPUT_TOKENS, OUTPUT_TOKENS))
    got = measure(Target(base_url, "paced"), [plan], Options(log=lambda line: None))[0]
    cpu_s = children_cpu_s() - before
    own_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "verdict": got["verdict"],
        "in_flight": got["peak_in_flight"],
        "lost": streams - got["completed"],
        "ttft_p50_s": got["ttft_s"]["p50"],
        "ttft_p99_s": got["ttft_s"]["p99"],
        "itl_p50_s": got["itl_s"]["p50"],
        "send_lag_p99_s": got["send_lag_s"]["p99"],
        "events_per_cpu_s": got["output_tokens"] / cpu_s,
        "peak_rss_bytes": got["client_peak_rss_bytes"] + own_rss,
        "load": os.getloadavg()[0],
    }


def vllm_bench(base_url: str, streams: int) -> dict[str, float] | None:
    """TTFT p50 and p99 of `vllm bench serve` for the same burst; None where it cannot run."""
    tokenizer = os.environ.get("KIT_TOKENIZER")
    if not shutil.which("vllm") or not tokenizer:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", base_url),
            *("--endpoint", "/v1/chat/completions", "--model", "paced", "--tokenizer", tokenizer),
            *("--dataset-name", "random", "--random-input-len", str(INPUT_TOKENS)),
            *("--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(streams)),
            *("--ignore-eos", "--save-result", "--result-dir", folder),
            *("--result-filename", "result.json"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "result.json").read_text())
    return {"p50": result["median_ttft_ms"] / 1e3, "p99": result["p99_ttft_ms"] / 1e3}


def poisson(base_url: str, duration_s: float) -> dict[str, Any]:
    source = fixed_sessions(INPUT_TOKENS, OUTPUT_TOKENS)
    plan = level("request_rate", POISSON_RATE_PER_S, source, duration_s=duration_s, seed=1)
    got = measure(Target(base_url, "paced"), [plan], Options(log=lambda line: None))[0]
    return {"planned": len(plan.sessions), **got}


def burst_rows(binary: Path, repeats: int) -> list[str]:
    """A line per load: median of the repeats, the best one in brackets."""
    rows = []
    for streams, itl_s in (*BURSTS, TOO_MUCH):
        runs = []
        for _ in range(repeats):
            with paced_server(binary, itl_s) as base_url:
                runs.append(burst(base_url, streams))
                print(streams, itl_s, runs[-1], flush=True)
        other = None
        if (streams, itl_s) in BURSTS:
            with paced_server(binary, itl_s) as base_url:
                other = vllm_bench(base_url, streams)
        rows.append(row(streams, itl_s, runs, other))
    return rows


def row(streams: int, itl_s: float, runs: list[dict[str, Any]], other: dict[str, float] | None) -> str:
    def cell(name: str, scale: float, digits: int) -> str:
        values = [run[name] * scale for run in runs if run[name] is not None]
        if not values:
            return "-"
        fits = [-v if name == "events_per_cpu_s" else abs(v - ideal(name)) for v in values]
        best = values[fits.index(min(fits))]
        return f"{statistics.median(values):,.{digits}f} ({best:,.{digits}f})"

    def ideal(name: str) -> float:
        return {"itl_p50_s": itl_s, "ttft_p50_s": TTFT_S, "ttft_p99_s": TTFT_S}.get(name, 0.0) * 1e3

    verdicts = ", ".join(sorted({run["verdict"] for run in runs}))
    cells = [
        f"{streams:,} at {itl_s * 1e3:.0f} ms", verdicts,
        str(min(run["in_flight"] for run in runs)), str(max(run["lost"] for run in runs)),
        cell("ttft_p50_s", 1e3, 1), cell("ttft_p99_s", 1e3, 1), cell("itl_p50_s", 1e3, 2),
        cell("send_lag_p99_s", 1e3, 1), cell("events_per_cpu_s", 1, 0),
        cell("peak_rss_bytes", 2**-20, 0),
        f"{other['p50'] * 1e3:,.0f} / {other['p99'] * 1e3:,.0f}" if other else "-",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    model = platform.processor() or "unknown CPU"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release().split('-')[0]}"


def beside() -> str:
    """What else had a part in the measurement: load of others, and the priority against them."""
    load = f", load average {os.getloadavg()[2]:.1f} over 15 minutes"
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        return load + "; client and server had real-time priority (chrt -f 1) over the other work"
    return load


def report(rows: list[str], repeats: int, arrivals: dict[str, Any], duration_s: float) -> str:
    """The section of docs/performance.md."""
    head = (
        "streams and ITL", "verdict", "in flight", "lost", "TTFT p50, ms", "TTFT p99, ms",
        "ITL p50, ms", "send lag p99, ms", "events per CPU s", "peak RSS, MiB",
        "vllm bench serve TTFT p50 / p99, ms",
    )  # fmt: skip
    lag = arrivals["send_lag_s"]
    return "\n".join(
        [
            f"Measured on {datetime.date.today()}, client and server sharing {machine()}{beside()}.",
            f"Median of {repeats} runs, the best one in brackets; the server is fresh for each run, "
            f"its TTFT is {TTFT_S * 1e3:.0f} ms, an answer has {OUTPUT_TOKENS} tokens.",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *rows,
            "",
            f"Poisson arrivals, {POISSON_RATE_PER_S:.0f} per second for {duration_s:.0f} s: "
            f"{arrivals['planned']} planned, {arrivals['sent']} sent, {arrivals['failed']} failed; send "
            f"lag p50 {lag['p50'] * 1e3:.2f} ms, p99 {lag['p99'] * 1e3:.2f} ms, "
            f"max {lag['max'] * 1e3:.2f} ms; {arrivals['verdict']}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--poisson-s", type=float, default=600.0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "paced_server"
        source = HERE / "paced_server.c"
        subprocess.run(["cc", "-O2", "-o", str(binary), str(source)], check=True)
        rows = burst_rows(binary, options.repeats)
        with paced_server(binary, 0.020) as base_url:
            arrivals = poisson(base_url, options.poisson_s)
    text = report(rows, options.repeats, arrivals, options.poisson_s)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
