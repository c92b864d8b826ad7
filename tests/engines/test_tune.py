"""`kit tune` on the real vLLM and SGLang: the flag arrives, a kill in the middle costs one level. make test-engines"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.engines.launch import ENVIRONMENTS, template

pytestmark = pytest.mark.engine

MODEL, WORKLOAD = str(ENVIRONMENTS / "tiny-model"), str(Path(__file__).with_name("tuning.yaml"))
LIMIT = re.compile(r"'?(?:max_num_seqs|max_running_requests)'?[=:] ?(\d+)")


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "tuning.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_killed_tuning_goes_on_and_the_flag_arrives(name: str, tmp_path: Path):
    if not list((ENVIRONMENTS / name).glob("installed-*")):
        pytest.skip(f"{name} is not installed: make engine ENGINE={name}")
    kit = str(Path(sys.executable).with_name("kit"))
    call = [kit, "tune", "--engine", name, "--model", MODEL, "--gpu", "l4-24gb", "--workload", WORKLOAD]
    call += ["--slo-ttft-s", "0.5", "--slo-tpot-s", "0.03", "--max-model-len", "8192", "--enforce-eager"]
    call += ["--engine-command", template(name, MODEL, {}), "--duration", "5", "--max-boots", "2"]
    call += ["--out", str(tmp_path), "--json"]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert first.stderr
    for line in first.stderr:
        if line.startswith("start 1") and "closed 32" in line:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = records(tmp_path)
    assert len(before) >= 3  # a start and two levels
    done = subprocess.run(call, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    result, after = json.loads(done.stdout), records(tmp_path)
    assert after[: len(before)] == before
    levels = [(one["boot"], one["kind"], one["concurrency"], one["seed"]) for one in after if "kind" in one]
    assert len(set(levels)) == len(levels) == len(result["evidence"])
    starts = [one for one in after if "flags" in one]
    assert len(starts) == result["boots"] <= 2
    for start in starts:
        told = {int(found) for found in LIMIT.findall((tmp_path / f"boot-{start['index']}.log").read_text())}
        assert start["flags"]["max_num_seqs"] in told
        assert start["kv_cache_tokens"] > 10_000
    for one in result["evidence"]:
        assert one["preemptions"] == 0
        assert one["requests_per_s"] > 0
        assert one["running_mean"] <= one["max_num_seqs"]
    until = time.monotonic() + 40  # no engine of either call is left
    while running(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    assert not running(tmp_path)


def running(folder: Path) -> list[int]:
    """Processes that write to a log in this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/[12]"):
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(int(link.parts[2]))
        except OSError:
            continue
    return found
