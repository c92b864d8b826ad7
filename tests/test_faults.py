"""Ctrl-C, a wall clock that jumps, a full disk, no network: a clear line, never a traceback, nothing measured lost."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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


def heard() -> None:
    """In a child: Ctrl-C is not ignored, as it is where the tests themselves run in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("after_s", [0.15, 0.3, 0.6, 1.2])
@pytest.mark.parametrize("command", [TUNE, FLEET], ids=["tune", "fleet"])
def test_ctrl_c_is_one_line_and_exit_130(command: list[str], after_s: float, tmp_path: Path) -> None:
    more = ["--out", str(tmp_path)] if command is TUNE else []
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
    process = subprocess.Popen([*KIT, *command, *more], **piped)
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
    call = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(call, capture_output=True, text=True, timeout=20, preexec_fn=heard)
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


def in_a_namespace(kind: str, script: str, *, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A shell with mounts (-m) or a network (-n) of its own, `kit` on its path."""
    if subprocess.run(["unshare", kind, "true"], capture_output=True).returncode:
        pytest.skip(f"unshare {kind} is not allowed here")
    kit = shlex.join(KIT)
    script = f'set -u; kit() {{ {kit} "$@"; }}; {script}'
    return subprocess.run(["unshare", kind, "bash", "-c", script], cwd=folder, capture_output=True, text=True)


SIMULATED = "--simulate --model llama-3.1-8b --gpu l40s-48gb --workload customer-service --slo-ttft-s 1 --max-boots 1"
FULL = f"""
mkdir disk; mount -t tmpfs -o size=64k tmpfs disk; head -c 65000 /dev/zero > disk/fill
kit tune {SIMULATED} --slo-tpot-s 0.05 --out disk/tune > /dev/null 2> first; echo $?
wc -l < disk/tune/tuning.jsonl
kit deploy --scenario customer-service --architecture single-node --out disk/bundle; echo $?
rm disk/fill
kit tune {SIMULATED} --slo-tpot-s 0.05 --out disk/tune --json 2> second; echo $?
wc -l < disk/tune/tuning.jsonl
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and namespaces are Linux's")
def test_a_full_disk_is_told_and_a_second_start_goes_on(tmp_path: Path) -> None:
    done = in_a_namespace("-m", FULL, folder=tmp_path)
    code, kept, deployed, result, again, now = done.stdout.split("\n", 5)
    assert (code, deployed, again) == ("2", "2", "0"), done.stderr
    assert (tmp_path / "first").read_text().splitlines()[-1].endswith("No space left on device")
    assert done.stderr.strip().endswith("No space left on device")
    assert "Traceback" not in done.stderr + (tmp_path / "first").read_text()
    assert int(now) > int(kept)
    assert json.loads(result)["recommended"]


OFFLINE = """
ip link set lo up
kit size --model some-org/a-model --gpu l4-24gb; echo $?
kit load --base-url http://example.com --model x --input-tokens 9 --output-tokens 9 --burst 1; echo $?
kit record --upstream https://example.com --port 0; echo $?
kit simulate --model llama-3.1-8b --gpu l4-24gb --workload customer-service --sessions 3 > /dev/null; echo $?
"""


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_without_a_network_the_shipped_data_serve_and_the_rest_is_told(tmp_path: Path) -> None:
    done = in_a_namespace("-n", OFFLINE, folder=tmp_path)
    assert done.stdout.split() == ["2", "2", "2", "0"]
    model, load, record = done.stderr.strip().splitlines()
    assert "unknown model 'some-org/a-model'" in model
    assert "huggingface.co has no config.json of it" in model
    assert "cannot reach http://example.com" in load
    assert "--upstream https://example.com: cannot be reached" in record


@pytest.mark.parametrize(
    "command",
    [
        ["deploy", "--scenario", "customer-service", "--architecture", "single-node"],
        ["tune", *SIMULATED.split(), "--slo-tpot-s", "0.05"],
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    done = subprocess.run([*KIT, *command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"kit: {out}")
    assert "Traceback" not in done.stderr
