"""Real vLLM and SGLang under `kit load` (make test-engines). Each is skipped where it is not installed.

On a CPU they show behaviour, never speed; SGLang's CPU install is unsupported, with kernels that are
torch-native fallbacks and stand-ins for its kernel wheel (tests/engines/sglang_cpu).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kit.engines import Engine, EngineFailed, Launch, launch, start
from kit.engines.launch import ENVIRONMENTS, ROOT

pytestmark = pytest.mark.engine

MODEL = ENVIRONMENTS / "tiny-model"
MAX_NUM_SEQS = 16
FLAGS: dict[str, dict[str, object]] = {
    "vllm": {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 8192, "enforce_eager": True},
    "sglang": {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 8192},
}
PROBES = 2  # one-token requests by which `kit load` finds what a prompt word costs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plan(engine: str, **more: object) -> Launch:
    if not list((ENVIRONMENTS / engine).glob("installed-*")):
        pytest.skip(f"{engine} is not installed: make engine ENGINE={engine}")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # the other tests run without a GPU in sight
        del os.environ["CUDA_VISIBLE_DEVICES"]
    flags = FLAGS[engine] | more
    return launch(engine, str(MODEL), flags, port=free_port(), served_model_name="tiny")


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp(request.param) / "engine.log"
    with start(plan(request.param), log, deadline_s=400) as running:
        print(f"\n{request.param}: healthy after {running.started_s:.0f} s")
        yield running


def kit_load(engine: Engine, out: Path, *options: str) -> "subprocess.Popen[str]":
    """`kit load` as a user calls it."""
    kit = str(Path(sys.executable).with_name("kit"))
    call = [kit, "load", "--base-url", engine.launch.base_url, "--model", "tiny"]
    call += ["--json", "--out", str(out), *options]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def loaded(engine: Engine, out: Path, *options: str) -> dict[str, Any]:
    process = kit_load(engine, out, *options)
    answer, progress = process.communicate(timeout=300)
    assert process.returncode == 0, progress
    return dict(json.loads(answer))


def attainment(result: dict[str, Any]) -> float:
    """Share of requests within the limits; a busy machine may make the client the limit."""
    valid = result["verdict"] == "VALID"
    return float(result["slo_attainment_fraction" if valid else "slo_attainment_not_valid"])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]


def test_the_log_tells_the_pool_that_the_metrics_page_tells(engine: Engine):
    page = engine.metrics()
    assert page is not None
    assert page.engine == engine.launch.engine
    assert engine.kv_cache_tokens() == page.kv_cache_tokens
    assert int(engine.start_log()["max_num_seqs"]) == MAX_NUM_SEQS


def test_single_stream_counts_and_streams(engine: Engine, tmp_path: Path):
    lengths = ["--input-tokens", "120", "--output-tokens", "24"]
    before = engine.metrics()
    result = loaded(engine, tmp_path, *lengths, "--concurrency", "1", "--requests", "6")
    after = engine.metrics()
    assert before
    assert after
    assert (result["sent"], result["completed"], result["failed"]) == (6, 6, 0)
    assert result["output_tokens"] == 6 * 24
    assert result["peak_in_flight"] == 1
    for record in records(tmp_path):
        assert record["chunks"] > 12  # streamed: a busy engine may put two tokens into one chunk
        assert record["sent_s"] < record["first_token_s"] <= record["last_token_s"] <= record["end_s"]
    # An engine that gets no processor time delivers a whole answer at once; not every time.
    assert any(record["first_token_s"] < record["last_token_s"] for record in records(tmp_path))
    assert after.generation_tokens is not None
    assert before.generation_tokens is not None
    assert after.generation_tokens - before.generation_tokens == 6 * 24 + PROBES
    prompts = sum(record["prompt_tokens"] for record in records(tmp_path))
    assert after.prompt_tokens is not None
    assert before.prompt_tokens is not None
    assert after.prompt_tokens - before.prompt_tokens >= prompts


def test_a_burst_never_runs_more_than_max_num_seqs(engine: Engine, tmp_path: Path):
    lengths = ["--input-tokens", "100", "--output-tokens", "300"]
    seen, waiting, over = [], [], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            with contextlib.suppress(OSError):  # its page may be late while it takes 60 requests at once
                page = engine.metrics()
                assert page
                seen.append(page.running)
                waiting.append(page.waiting)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = loaded(engine, tmp_path, *lengths, "--burst", "60", "--slo-ttft-s", "0.5")
    finally:
        over.set()
        watcher.join()
    assert (result["sent"], result["completed"], result["failed"]) == (60, 60, 0)
    assert result["peak_in_flight"] == 60
    assert result["output_tokens"] == 60 * 300
    assert max(seen) == MAX_NUM_SEQS
    assert max(waiting) > MAX_NUM_SEQS  # 60 at once, 16 of them in the batch
    told = result["server"]
    assert 0 < told["running"] <= MAX_NUM_SEQS
    assert told["preemptions"] == 0
    assert told["ttft_count"] in (60, 60 + PROBES)
    assert 0 <= told["kv_cache_usage"] <= 1
    assert 0 < attainment(result) < 1  # 60 streams through 16 places: the last wait


def test_agent_sessions_hit_the_prefix_cache_after_their_pauses(engine: Engine, tmp_path: Path):
    workload = str(Path(__file__).with_name("sessions.yaml"))
    result = loaded(engine, tmp_path, "--workload", workload)
    rows = records(tmp_path)
    assert (result["sent"], result["completed"], result["failed"]) == (18, 18, 0)
    assert {row["turn"] for row in rows} == {0, 1, 2}
    by_session: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["turn"]):
        by_session.setdefault(row["session"], []).append(row)
    for turns in by_session.values():
        for one, next_one in pairwise(turns):
            assert next_one["sent_s"] - one["end_s"] >= 0.95  # the tool's pause
            assert next_one["prompt_tokens"] > one["prompt_tokens"]
    # Turns 2 and 3 repeat everything said before; blocks of 128 tokens (vLLM on a CPU) lose a part.
    assert result["server"]["prefix_hit_fraction"] > 0.5


def test_a_wrong_flag_is_told_in_one_line(engine: Engine, tmp_path: Path):
    wrong = plan(engine.launch.engine, **{"--no-such-flag": "7"})
    with pytest.raises(EngineFailed, match=r"unrecognized arguments: --no-such-flag"):
        start(wrong, tmp_path / "engine.log", deadline_s=120)


def test_a_killed_server_leaves_partial_results_and_misses(engine: Engine, tmp_path: Path):
    """The last test of an engine: it does not survive."""
    lengths = ["--input-tokens", "100", "--output-tokens", "150"]
    load = kit_load(engine, tmp_path, *lengths, "--concurrency", "8", "--requests", "2000", "--slo-ttft-s", "30")
    until = time.monotonic() + 60
    while load.poll() is None and time.monotonic() < until and len(tail(tmp_path / "requests.jsonl")) < 12:
        time.sleep(0.1)
    os.killpg(engine.process.pid, signal.SIGKILL)
    answer, progress = load.communicate(timeout=200)
    assert load.returncode == 0, progress
    result = json.loads(answer)
    assert result["completed"] >= 12
    assert result["failed"] >= 1
    assert sum(result["failures"].values()) == result["failed"]
    assert result["sent"] <= result["completed"] + result["failed"]
    rows = records(tmp_path)
    assert sum(row["ok"] for row in rows) == result["completed"]
    everything = result["completed"] + result["failed"]
    assert attainment(result) == pytest.approx(result["completed"] / everything, abs=0.02)


def tail(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_killed_caller_leaves_no_engine_behind(name: str, tmp_path: Path):
    wanted = plan(name)
    program = (
        "import sys, time; from pathlib import Path; from kit.engines import launch, start\n"
        f"one = launch({name!r}, {str(MODEL)!r}, {FLAGS[name]!r}, port={wanted.port})\n"
        f"start(one, Path({str(tmp_path / 'engine.log')!r}), tell=lambda line: print(line, flush=True))\n"
        "print('UP', flush=True); time.sleep(600)"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert caller.stdout
    for line in caller.stdout:  # half-way through the start: processes are there, nothing serves yet
        if "model" in line.lower():
            break
    group = group_on(wanted.port)
    assert members(group)
    caller.kill()
    caller.wait()
    until = time.monotonic() + 30
    while members(group) and time.monotonic() < until:
        time.sleep(0.2)
    assert members(group) == []


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_killed_live_run_leaves_nothing_behind_and_resumes(name: str, tmp_path: Path):
    plan(name)  # or skip
    kit = str(Path(sys.executable).with_name("kit"))
    call = [kit, "run", "--live", "--engine", name, "--notebooks", "02,04", "--out", str(tmp_path), "--json"]
    for setting in ("concurrency=1,4", "burst=20", "sessions=2", "requests_per_stream=1"):
        call += ["--set", setting]
    with (tmp_path / "first.log").open("w") as progress:
        first = subprocess.Popen(call, stdout=progress, stderr=progress)
    until = time.monotonic() + 300
    while not (done := list(tmp_path.glob("*/04_load_test/load/concurrency-1/summary.json"))):
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    begun = offspring(first.pid)
    assert len(begun) >= 4  # the engine and its guard, a notebook's kernel, and what they started
    first.kill()
    first.wait()
    until = time.monotonic() + 40
    while (left := begun & living()) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == set()
    measured = done[0].stat().st_mtime_ns
    second = subprocess.run(call, capture_output=True, text=True, timeout=400, check=False)
    assert second.returncode == 0, second.stderr
    rows = {row["notebook"]: row for row in json.loads(second.stdout)["notebooks"]}
    assert done[0].stat().st_mtime_ns == measured  # the level is not measured again
    assert not list(tmp_path.glob("*/02_size_vram/results.previous.json"))  # nor is 02 run again
    results = json.loads(Path(rows["04_load_test"]["results"]).read_text())
    assert results["source"] == "live"
    assert "never a speed" in rows["04_load_test"]["note"]
    with socket.socket() as probe:  # stopped
        port = int(rows["04_load_test"]["parameters"]["base_url"].rpartition(":")[2])
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def offspring(pid: int) -> set[tuple[int, str]]:
    """A process's children and theirs, each with the time of its start, which tells it from a later one."""
    parents = {int(folder.name): (int(fields[1]), fields[19]) for folder, fields in stats()}
    found = {pid}
    while more := {child for child, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    return {(one, parents[one][1]) for one in found - {pid}}


def living() -> set[tuple[int, str]]:
    return {(int(folder.name), fields[19]) for folder, fields in stats() if fields[0] != "Z"}


def stats() -> Iterator[tuple[Path, list[str]]]:
    """Every process of this machine with the fields after its name: state, parent, group .."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield folder, (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue


def group_on(port: int) -> int:
    """The process group of the engine that was told this port."""
    for folder, fields in stats():
        if f"--port\0{port}\0".encode() in (folder / "cmdline").read_bytes():
            return int(fields[2])
    raise AssertionError(f"no process was started with --port {port}")


def members(group: int) -> list[str]:
    """Living processes of a group."""
    return [folder.name for folder, fields in stats() if fields[2] == str(group) and fields[0] != "Z"]
