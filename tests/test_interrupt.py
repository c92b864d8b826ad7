"""Ctrl-C wherever it falls: a line, exit 130, never a traceback; and a wall clock that jumps changes no measure."""

import signal
import subprocess
import sys
import time
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
