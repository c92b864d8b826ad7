"""Ctrl-C wherever it falls: a line, exit 130, never a traceback; and a wall clock that jumps changes no measure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
FLEET = ["fleet", "--scenario", str(Path(__file__).parents[1] / "data/scenarios/customer-service.yaml")]
TUNE = ["tune", "--emulate", "--model", "llama-3.1-8b", "--gpu", "l40s-48gb", "--workload", "customer-service"]
TUNE += ["--slo-ttft-s", "1", "--slo-tpot-s", "0.05"]
# A command whose work a callback of Python's own interrupts, as an import's may be: Python swallows that one.
SWALLOWED = """
import sys, time, types
from kit import cli

class Callback:
    def __del__(self):
        raise KeyboardInterrupt

def command() -> None:
    Callback()
    time.sleep(30)

sys.modules["kit.cli.size"] = types.SimpleNamespace(command=command)
sys.argv = ["kit", "size"]
cli.main()
"""


@pytest.mark.parametrize("after_s", [0.15, 0.3, 0.6, 1.2])
@pytest.mark.parametrize("command", [TUNE, FLEET], ids=["tune", "fleet"])
def test_ctrl_c_is_one_line_and_exit_130(command: list[str], after_s: float, tmp_path: Path) -> None:
    more = ["--out", str(tmp_path)] if command is TUNE else []
    process = subprocess.Popen([*KIT, *command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    if process.returncode == 0:  # it was done before
        return
    assert process.returncode in (130, -signal.SIGINT), told  # the second: before Python was up
    assert "Traceback" not in told or process.returncode < 0
    if process.returncode == 130:
        assert told.splitlines()[-1].startswith("kit: interrupted")
        assert ("goes on" in told) == (command is TUNE)


def test_a_ctrl_c_that_python_swallows_comes_again() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (130, "kit: interrupted\n")


@contextmanager
def serving(env: dict[str, str], *command: str) -> Iterator[str]:
    """A kit server on a free port: its base URL."""
    process = subprocess.Popen([*KIT, *command, "--port", "0", "--json"], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


MODEL = ["--model", "llama-3.1-8b"]
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(FAKETIME is None, reason="no libfaketime: apt-get install faketime")
@pytest.mark.parametrize("jump", ["-3d", "+3d"])
def test_a_wall_clock_that_jumps_changes_nothing_measured(jump: str, tmp_path: Path) -> None:
    """Server, proxy and client with a wall clock that jumps while calls of 0.5 s run."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    env = os.environ | {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock)}
    env |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    asked = [sys.executable, "-c", "import time; print(time.time() - time.monotonic())"]
    before = float(subprocess.run(asked, env=env, capture_output=True, check=True).stdout)
    recording = tmp_path / "recording.jsonl"
    with ExitStack() as servers:
        emulator = servers.enter_context(serving(env, "emulate", *MODEL, "--gpu", "l4-24gb", "--pace", "100,10"))
        proxy = servers.enter_context(serving(env, "record", "--upstream", emulator, "--out", str(recording)))
        load = [*KIT, "load", "--base-url", proxy, *MODEL, "--input-tokens", "100", "--output-tokens", "41"]
        load += ["--concurrency", "2", "--requests", "16", "--out", str(tmp_path / "load"), "--json"]
        process = subprocess.Popen(load, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list((tmp_path / "load").rglob("requests.jsonl")):
            time.sleep(0.05)
        time.sleep(1.5)
        clock.write_text(jump)
        answer, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
    after = float(subprocess.run(asked, env=env, capture_output=True, check=True).stdout)
    assert abs(after - before) > 2 * 86_400  # it did jump
    result = json.loads(answer)
    assert (result["sent"], result["completed"]) == (16, 16)
    assert 0.45 < result["e2el_s"]["p50"] < 1.5  # 0.1 s and 40 gaps of 10 ms
    assert result["e2el_s"]["max"] < 60
    assert 3 < result["duration_s"] < 60
    calls = [json.loads(line) for line in recording.read_text().splitlines()[1:]]
    assert all(0 <= call["start_s"] < call["first_token_s"] < call["end_s"] < 60 for call in calls)
    ends = [call["end_s"] for call in calls]
    assert ends == sorted(ends)
