"""What notebooks measure with: the emulator started and stopped, levels kept and read again, limits of the host."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit import measure
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.loadgen import Options, fixed_sessions, level

OPTIONS = Options(5.0, None, log=lambda line: None)
SERVED = ("qwen3-0.6b", "h100-sxm-80gb", EngineConfig(max_model_len=4096), OPTIONS)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def bench():
    one = measure.bench("emulator", *SERVED)
    yield one
    one.engine.stop()


def test_a_level_is_measured_and_its_requests_are_rows(bench):
    summary, requests = bench.measure(level("burst", 5, fixed_sessions(100, 4)))
    assert (summary["completed"], summary["failed"]) == (5, 0)
    assert len(requests) == 5
    assert (requests["output_tokens"] == 4).all()
    assert (requests["first_token_s"] >= requests["sent_s"]).all()


def test_what_was_measured_is_read_without_a_server(bench):
    one = level("burst", 3, fixed_sessions(50, 2))
    summary, _ = bench.measure(one)
    read = measure.bench("recorded", *SERVED, place=bench.folder)
    assert read.measure(one)[0] == summary
    assert read.ask_json("n?", FORM, 50) is None
    with pytest.raises(UserError, match="holds no level burst-4"):
        read.measure(level("burst", 4, fixed_sessions(50, 2)))


def test_a_live_server_is_asked_for_its_model(bench, tmp_path):
    live = measure.bench("live", *SERVED, place=f"{tmp_path}/load", base_url=bench.target.base_url)
    assert (live.target.model, live.source) == ("qwen3-0.6b", "emulator")  # it tells that it is one
    live.measure(level("burst", 2, fixed_sessions(50, 2)))
    assert (tmp_path / "load/burst-2/requests.jsonl").exists()
    with pytest.raises(UserError, match="another sessions"):
        live.measure(level("burst", 2, fixed_sessions(60, 2)))


def test_answers_by_schema(bench):
    assert isinstance(bench.ask_json("n?", FORM, 50)["n"], int)
    assert bench.ask_json("n?", FORM, 1) is None  # cut off


def test_no_recorded_run(tmp_path):
    with pytest.raises(UserError, match="nothing there"):
        measure.bench("recorded", *SERVED, place=tmp_path)


def test_host_limits():
    small, large = measure.host_limits(1), measure.host_limits(10**9)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert [row["now"] for row in small[:2]] == [soft, hard]
    assert small[0]["needed"] == 65
    assert [row["enough"] for row in small[:2]] == [soft >= 65, hard >= 65]
    assert not any(row["enough"] for row in large)
    assert "1000000064" in large[1]["raise it"]
    if Path("/proc/sys/net/core/somaxconn").exists():
        assert small[2]["now"] == int(Path("/proc/sys/net/core/somaxconn").read_text())
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        assert small[3]["now"] == high - low + 1


def test_the_emulator_ends_with_a_killed_caller():
    code = "from kit import measure; from tests.test_measure import SERVED; import time\n"
    code += "print(measure.bench('emulator', *SERVED).engine.process.pid, flush=True); time.sleep(60)"
    root = Path(__file__).resolve().parents[1]
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    emulator = int(caller.stdout.readline())
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{emulator}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{emulator}").exists()


def test_a_live_server_of_a_host_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GpuSampler", lambda: SimpleNamespace(handles=[]))
    assert measure.label("live", "http://127.0.0.1:8000") == measure.label("live") == measure.LABELS["cpu"]
    assert measure.label("live", "https://gpu.example/v1") == measure.LABELS["live"]
    assert measure.label("emulator", "http://127.0.0.1:8000") == measure.LABELS["emulator"]
    monkeypatch.setattr(measure, "GpuSampler", lambda: SimpleNamespace(handles=["one"]))
    assert measure.label("live", "http://127.0.0.1:8000") == measure.LABELS["live"]
