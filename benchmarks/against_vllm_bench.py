"""kit load and `vllm bench serve` in turn against one real vLLM: how far apart are they?

    make engine ENGINE=vllm && .venv/bin/python benchmarks/against_vllm_bench.py --write

Both drive the same server with a closed loop of 16 streams over /v1/chat/completions: the same prompt and
answer lengths in the same order, which vary, because equal ones keep all streams in step and then the
order of a few milliseconds decides the TTFT (the server's own histogram differed by 15 %). The table tells
how alike the prompts came out. Prefix caching is off: random prompts of so small a vocabulary repeat. The
model is the engines' tiny one made wider (dummy weights), so that the engine, on a core of its own, is
what limits and neither client starves the server. The order changes from pair to pair, and what is
compared is the relative difference within each pair, so that a slow drift of the machine drops out. With
--write the table goes into docs/performance.md.
On a CPU this says how well two clients agree, and nothing about the speed of an engine.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from kit.engines import Engine, launch, start
from kit.engines.launch import ENVIRONMENTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- engines -->", "<!-- /engines -->"
CONCURRENCY, REQUESTS = 16, 128
MEAN_LEN, SPREAD, SEED = 64, 0.5, 1000  # 32 to 96 tokens, uniform: equal ones would march in step
MODEL = ENVIRONMENTS / "tiny-model"
WIDER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
QUANTITIES = {
    "prompt_tokens": "prompt tokens (the input)",
    "output_tokens_per_s": "output tokens/s",
    "ttft_s": "TTFT mean, s",
    "tpot_s": "TPOT mean, s",
}


# Prompt (chat template included) and answer tokens, in order, as the server counted vllm bench's in the warm-up.
lengths: list[tuple[int, int]] = []


def with_kit(engine: Engine) -> dict[str, Any]:
    """One run of kit load."""
    call = [Path(sys.executable).with_name("kit"), "load", "--base-url", engine.launch.base_url, "--model", "tiny"]
    call += ["--concurrency", CONCURRENCY, "--requests", REQUESTS, "--seed", SEED, "--json"]
    rows = [f"2026-01-01 00:00:00,{prompt},{answer}" for prompt, answer in lengths]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
        call += ["--trace", trace, "--trace-format", "azure", "--out", Path(folder) / "out"]
        done = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=True)
        (requests,) = (Path(folder) / "out").rglob("requests.jsonl")
        prompts = [json.loads(line)["prompt_tokens"] for line in requests.read_text().splitlines()]
    told = json.loads(done.stdout)
    assert told["completed"] == REQUESTS, told["failures"]
    assert told["output_tokens"] == sum(answer for _, answer in lengths)
    return {
        "prompt_tokens": float(np.mean(prompts)),
        "output_tokens_per_s": told["output_tokens_per_s"],
        "ttft_s": told["ttft_s"]["mean"],
        "tpot_s": told["tpot_s"]["mean"],
        "verdict": told["verdict"],
        "reasons": told["verdict_reasons"],
    }


def with_vllm(engine: Engine) -> dict[str, Any]:
    """One run of vllm bench serve."""
    with tempfile.TemporaryDirectory() as folder:
        call = [ENVIRONMENTS / "vllm" / "bin" / "vllm", "bench", "serve", "--backend", "openai-chat"]
        call += ["--base-url", engine.launch.base_url, "--endpoint", "/v1/chat/completions", "--model", "tiny"]
        call += ["--tokenizer", MODEL, "--dataset-name", "random", "--random-range-ratio", SPREAD, "--save-detailed"]
        call += ["--random-input-len", MEAN_LEN, "--random-output-len", MEAN_LEN]
        call += ["--num-prompts", REQUESTS, "--max-concurrency", CONCURRENCY]
        call += ["--num-warmups", 8]  # kit load's probes wake the engine too
        call += ["--ignore-eos", "--seed", SEED, "--save-result", "--result-dir", folder, "--disable-tqdm"]
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        subprocess.run(list(map(str, call)), capture_output=True, text=True, check=True, env=quiet)
        (result,) = Path(folder).glob("*.json")
        told = json.loads(result.read_text())
    assert told["completed"] == REQUESTS
    lengths[:] = zip(told["input_lens"], told["output_lens"], strict=True)
    return {
        "prompt_tokens": float(np.mean(told["input_lens"])),
        "output_tokens_per_s": told["output_throughput"],
        "ttft_s": told["mean_ttft_ms"] / 1e3,
        "tpot_s": told["mean_tpot_ms"] / 1e3,
    }


def widened(folder: Path) -> Path:
    """The tiny model's tokenizer beside a wider config; the engine makes the weights up."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | WIDER))
    return folder


def apart(server: int) -> None:
    """The engine core has one processor; API server and both clients, children of this process, have the other."""
    found = subprocess.run(["pgrep", "-P", str(server)], capture_output=True, text=True, check=True)
    for pid, processor in [(server, 1), (os.getpid(), 1), *((int(pid), 0) for pid in found.stdout.split())]:
        subprocess.run(["taskset", "--all-tasks", "--cpu-list", "--pid", str(processor), str(pid)], check=True)


def measure(pairs: int) -> list[dict[str, Any]]:
    """The pairs, after one run of each that warms the server up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"max_num_seqs": CONCURRENCY, "max_model_len": 4096, "enforce_eager": True}
    flags |= {"--no-enable-prefix-caching": True, "--load-format": "dummy"}
    # Worker and engine core in one process: apart, the core polls for the worker and takes the clients' processor.
    flags |= {"--distributed-executor-backend": "uni"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        model = widened(Path(folder) / "model")
        wanted = launch("vllm", str(model), flags, port=port, served_model_name="tiny")
        engine = running.enter_context(start(wanted, Path(folder) / "engine.log"))
        apart(engine.process.pid)
        for index in range(pairs + 1):
            order = [("kit", with_kit), ("vllm", with_vllm)][
                :: 1 if index % 2 else -1
            ]  # the warm-up begins with vllm, which draws the lengths
            row = {name: run(engine) for name, run in order}
            if index:
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Means of both, mean relative difference and its interval."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in facts if "model name" in line), platform.machine())
    load = os.getloadavg()[2]
    valid = sum(row["kit"]["verdict"] == "VALID" for row in rows)
    lines = [
        f"Measured on {datetime.date.today()}, vLLM 0.32.0 on one core, its API server and the clients on the other "
        f"of {os.cpu_count()} of {cpu}, {platform.system()} {platform.release().split('-')[0]}, "
        f"load average {load:.1f} over 15 minutes.",
        f"{len(rows)} pairs at concurrency {CONCURRENCY}, {REQUESTS} requests each of {MEAN_LEN} tokens "
        f"+- {SPREAD:.0%} in and out, the same for both; kit load called {valid} of {len(rows)} runs VALID. "
        "A CPU engine shows how clients agree, not how fast an engine is.",
        "",
        "| quantity | kit load | vllm bench serve | kit against vllm, mean | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, title in QUANTITIES.items():
        ours, theirs = (np.array([row[who][name] for row in rows]) for who in ("kit", "vllm"))
        change = ours / theirs - 1
        half = stats.t.ppf(0.975, len(rows) - 1) * change.std(ddof=1) / np.sqrt(len(rows))
        mean, low, high = change.mean(), change.mean() - half, change.mean() + half
        lines.append(f"| {title} | {ours.mean():.4g} | {theirs.mean():.4g} | {mean:+.1%} | {low:+.1%} to {high:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the section where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    text = report(measure(asked.pairs))
    print(text)
    if asked.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN + "\n")
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
