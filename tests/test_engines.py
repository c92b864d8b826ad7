"""Start commands, engine control on a small real process group, and the lint of metric names."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.engine_config import ENGINES, engine_data
from kit.engines import Engine, EngineFailed, Launch, launch, lint_metrics, start
from kit.engines.control import decisive_line
from kit.engines.launch import flag_arguments
from kit.errors import UserError

# A server with a child of its own, as engines have: healthy after a moment, deaf to SIGTERM if asked.
SERVER = """
import http.server, os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready = time.monotonic() + 0.5
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        page = b"vllm:num_requests_running 2.0\\n" if self.path == "/metrics" else b""
        self.send_response(200 if time.monotonic() > ready else 503)
        self.end_headers()
        self.wfile.write(page)
    def log_message(self, *_):
        pass
print("GPU KV cache size: 126,256 tokens", flush=True)
print("Application startup complete", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "server.py").write_text(SERVER)
    return f"{sys.executable} {tmp_path / 'server.py'} {{port}}"


def planned(command: str) -> Launch:
    return launch("vllm", "some/model", command=command, port=free_port())


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    if Path("/proc/self").exists():
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def gone(pid: int, within_s: float = 15.0) -> bool:
    until = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def test_an_engine_serves_until_its_block_ends(command: str, tmp_path: Path):
    told: list[str] = []
    with start(planned(command), tmp_path / "logs" / "engine.log", tell=told.append) as engine:
        page = engine.metrics()
        assert page is not None
        assert page.running == 2
        assert engine.kv_cache_tokens() == 126256
        assert engine.started_s > 0.4
        child = child_of(engine.log)
        assert alive(child)
    assert gone(child)
    assert engine.guard.poll() == 0
    assert "Application startup complete" in told


def test_what_ignores_sigterm_is_killed(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kit.engines.control.STOP_DEADLINE_S", 0.5)
    engine = start(planned(command + " --deaf"), tmp_path / "engine.log")
    engine.stop()
    engine.stop()
    assert engine.process.poll() == -signal.SIGKILL
    assert gone(child_of(engine.log))


def test_a_killed_caller_leaves_nothing_behind(command: str, tmp_path: Path):
    log = tmp_path / "engine.log"
    program = (
        "import time; from pathlib import Path; from kit.engines import launch, start\n"
        f"start(launch('vllm', 'm', command={command!r}, port={free_port()}), Path({str(log)!r}))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    assert caller.stdout.readline() == "up\n"
    child = child_of(log)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert gone(child)


def test_a_failed_start_shows_the_decisive_line(tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text("print('loading')\nraise ValueError('no room for the KV cache')\n")
    with pytest.raises(EngineFailed, match=r"vllm did not start: ValueError: no room for the KV"):
        start(planned(f"{sys.executable} {script}"), tmp_path / "engine.log")


def test_a_start_that_takes_too_long_is_stopped(command: str, tmp_path: Path):
    log = tmp_path / "engine.log"
    with pytest.raises(EngineFailed, match="not healthy yet; last line: "):
        start(planned(f"{sys.executable} -c 'import time; print(7); time.sleep(600)'"), log, deadline_s=0.6)


def test_a_port_in_use_and_a_missing_program_are_refused(command: str, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineFailed, match=f"something serves 127.0.0.1:{port} already"):
            start(launch("vllm", "m", command=command, port=port), tmp_path / "engine.log")
    with pytest.raises(EngineFailed, match="no program 'no-such-engine'"):
        start(planned("no-such-engine {model}"), tmp_path / "engine.log")


def test_a_start_cannot_outlive_an_interrupt(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(engine: Engine, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kit.engines.control._await_health", interrupt)
    started: list[int] = []
    real = subprocess.Popen

    def noted(*args: Any, **options: Any) -> Any:
        process = real(*args, **options)
        started.append(process.pid)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", noted)
        with pytest.raises(KeyboardInterrupt):
            start(planned(command), tmp_path / "engine.log")
    assert len(started) == 2  # the guard and the engine
    assert all(gone(pid) for pid in started)


LOG = """
(EngineCore pid=7) ERROR 11-24 10:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-24 10:00:00 [core.py:1]   File "worker.py", line 3, in load
(EngineCore pid=7) ERROR 11-24 10:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LOG, "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"),
        ("usage: serve\nserve: error: unrecognized arguments: --x 7\n", "error: unrecognized arguments: --x 7"),
        ("starting\nKilled\n", "Killed"),
        ("starting\nhalf a line", "half a line"),
        ("", "its log is empty"),
    ],
)
def test_the_decisive_line(text: str, line: str):
    assert decisive_line(text, engine_data("vllm")["start"]["failure_noise"]) == line


def test_flags_in_every_engines_words():
    flags = {"max_num_seqs": 64, "max_model_len": 8192, "max_num_batched_tokens": None}
    assert flag_arguments("vllm", flags)[0] == ["--max-num-seqs", "64", "--max-model-len", "8192"]
    assert flag_arguments("tensorrt-llm", flags)[0] == ["--max_batch_size", "64", "--max_seq_len", "8192"]
    assert flag_arguments("ollama", {"max_num_seqs": 4}) == ([], {"OLLAMA_NUM_PARALLEL": "4"})
    with pytest.raises(UserError, match="tgi has no flag for enforce_eager; it has tensor_parallel_size"):
        flag_arguments("tgi", {"enforce_eager": True})


@pytest.mark.parametrize("engine", ENGINES)
def test_every_template_has_its_fields(engine: str, tmp_path: Path):
    one = launch(engine, "org/model", port=8000, docker=True)
    text = " ".join(one.argv)
    assert one.container == f"kit-{engine}-8000"
    assert "127.0.0.1:8000" in text
    assert str(engine_data(engine)["newest"]) in text
    assert "{" not in text
    assert one.health.startswith("/")
    assert all(f"-e {name}={value}" in text for name, value in one.environment.items())
    if engine != "ollama":  # keeps models of its own
        assert "/.cache/huggingface:/root/.cache/huggingface" in text
        local = " ".join(launch(engine, str(tmp_path), port=8000, docker=True).argv)
        assert f"-v {tmp_path}:{tmp_path}:ro" in local


def test_the_users_command_takes_the_flags_where_it_wants_them():
    flags = {"max_num_seqs": 64}
    inside = launch("vllm", "m", flags, command="run {flags} --model {model}", port=1)
    assert inside.argv == ["run", "--max-num-seqs", "64", "--model", "m"]
    outside = launch("vllm", "m", flags, command="run {model}", port=1)
    assert outside.argv == ["run", "m", "--max-num-seqs", "64"]
    with pytest.raises(UserError, match=r"engine command 'run \{modle\}': 'modle'; known: bin, root"):
        launch("vllm", "m", flags, command="run {modle}", port=1)


def test_a_missing_engine_names_the_command_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["kit.engines.launch"], "ENVIRONMENTS", tmp_path)
    with pytest.raises(UserError, match="vllm is not installed: make engine ENGINE=vllm"):
        launch("vllm", "m", port=1)


def test_a_local_model_needs_no_hub_and_the_users_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    local = launch("vllm", str(tmp_path), command="run {model}", port=1)
    assert local.environment["HF_HUB_OFFLINE"] == "1"
    assert local.environment["VLLM_NO_USAGE_STATS"] == "0"
    assert "HF_HUB_OFFLINE" not in launch("vllm", "org/m", command="run", port=1).environment


DASHBOARD = """
histogram_quantile(0.99, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[5m])))
rate(vllm:num_preemptions_total[5m]) > 0 and vllm:kv_cache_usage_perc > 0.9
"""


def test_lint_accepts_what_is_printed_and_names_what_is_not():
    assert lint_metrics(DASHBOARD, "vllm") == []
    old = "rate(vllm:gpu_prefix_cache_hits_total[5m]) / vllm:no_such_metric + vllm:num_requests_swapped"
    assert lint_metrics(old, "vllm", "0.32.0") == [
        "vllm:gpu_prefix_cache_hits_total: not printed since vLLM 0.11.0; use vllm:prefix_cache_hits",
        "vllm:no_such_metric: vLLM prints no such metric",
        "vllm:num_requests_swapped: not printed since vLLM 0.8.0; use vllm:num_preemptions",
    ]


def test_lint_knows_metrics_that_are_printed_but_dead():
    (line,) = lint_metrics("sglang:max_running_requests_under_SLO", "sglang")
    assert line.startswith("sglang:max_running_requests_under_SLO: not printed since SGLang 0.5.23")


def test_the_environment_of_the_caller_reaches_the_engine(tmp_path: Path):
    script = tmp_path / "show.py"
    script.write_text("import os; raise ValueError(os.environ['KIT_TEST_MARK'])")
    os.environ["KIT_TEST_MARK"] = "seen"
    try:
        with pytest.raises(EngineFailed, match="ValueError: seen"):
            start(planned(f"{sys.executable} {script}"), tmp_path / "engine.log")
    finally:
        del os.environ["KIT_TEST_MARK"]
