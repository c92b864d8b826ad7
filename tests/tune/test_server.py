"""Servers as tuning machines: levels over HTTP on the emulator, and a server that its owner restarts."""

import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit import measure
from kit.engine_config import EngineConfig
from kit.engines import Engine
from kit.engines.launch import free_port
from kit.errors import UserError
from kit.loadgen import Target
from kit.tune import Goal, Offer, server
from kit.tune.server import ByHand, NotRestarted, Server, check_model, max_num_seqs
from kit.workload import load

MODEL, GPU = "qwen3-0.6b", "h100-sxm-80gb"
CONFIG = EngineConfig(max_model_len=4096, max_num_seqs=6)
WORKLOAD = load(str(Path(__file__).parents[1] / "engines" / "tuning.yaml"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    def begin(flags: dict[str, object], log: Path) -> Engine:
        return measure.emulate(MODEL, GPU, CONFIG, log, flags)

    offer, folder = Offer(WORKLOAD, 1.0, sessions=8, burst=4), tmp_path_factory.mktemp("tune")
    with Server(begin, offer, Goal(0.5, 0.05), folder) as one:
        yield one


def test_levels_of_a_started_engine(machine: Server):
    boot = machine.boot({"max_num_seqs": 6}, 1)
    assert (boot.max_num_seqs, boot.index) == (6, 1)
    assert boot.kv_cache_tokens > 100_000
    assert boot.start_s > 0
    closed = machine.closed_loop(boot, 4, 1, 20)
    rows = (machine.folder / "levels" / "boot-1-closed-4-1" / "requests.jsonl").read_text().splitlines()
    assert 28 <= len(rows) <= 31  # 20 judged, 4 that fill the loop and 4 that empty it
    assert (closed.n, closed.concurrency, closed.limit) == (len(rows) - 8, 4, 4)
    assert closed.slo_attainment_fraction == 1
    assert closed.prefix_hit_fraction > 0.3
    assert closed.preemptions == 0
    opened = machine.open_loop(boot, 1, 2)
    rows = (machine.folder / "levels" / "boot-1-open-2-1" / "requests.jsonl").read_text().splitlines()
    in_flight = json.loads((machine.folder / "levels" / "boot-1-open-2-1" / "summary.json").read_text())
    assert in_flight["peak_in_flight"] == 2
    assert (opened.n, opened.limit) == (len(rows), 2)


def test_what_was_measured_is_not_sent_again(machine: Server):
    boot = machine.boot({"max_num_seqs": 6}, 2)
    first = machine.closed_loop(boot, 2, 1, 10)
    machine.stop()
    assert machine.closed_loop(boot, 2, 1, 10) == first


@contextmanager
def serving(port: int, limit: int | None, model: str = "tiny") -> Iterator[None]:
    """Stands in for a server that somebody starts: a model and a limit, and nothing to measure."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = {"/v1/models": {"data": [{"id": model, "root": f"/models/{model}"}]}}
            told["/server_info"] = {"server_args": {"max_running_requests": limit}}
            body = json.dumps(told.get(self.path.partition("?")[0], {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    one = http.server.ThreadingHTTPServer(("127.0.0.1", port), Page)
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    try:
        yield
    finally:
        one.shutdown()
        one.server_close()
        thread.join()


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(server, "POLL_S", 0.02)
    monkeypatch.setattr(server, "GRACE_S", 0.3)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody to ask
    return Target(f"http://127.0.0.1:{free_port()}", "tiny")


def begun(by_hand: ByHand, limit: int) -> Target:
    return by_hand({"max_num_seqs": limit}, Path("unused.log"))


def test_a_server_that_runs_with_the_flags_is_taken_at_once(target: Target, capsys):
    with serving(target.address[1], 48):
        assert begun(ByHand(target, "sglang", {}, ask=True), 48) == target
    assert capsys.readouterr().err == ""


def test_the_owner_is_told_the_flags_and_waited_for(target: Target, capsys):
    by_hand, answers = ByHand(target, "sglang", {"max_model_len": 4096}, ask=True, first=False), []
    with serving(target.address[1], 48):
        waiting = threading.Thread(target=lambda: answers.append(begun(by_hand, 64)))
        waiting.start()
        while "Waiting" not in (told := capsys.readouterr().err):
            pass
    assert "--context-length 4096 --max-running-requests 64" in told
    with serving(target.address[1], 64):
        waiting.join()
    assert answers == [target]


def test_nobody_to_ask_ends_the_waiting(target: Target, capsys):
    by_hand = ByHand(target, "vllm", {}, ask=True)
    with serving(target.address[1], 48):
        assert begun(by_hand, 64) == target  # the first start: as it is
        assert max_num_seqs(target) == 48
        with pytest.raises(NotRestarted, match="not restarted with --max-num-seqs 64"):
            begun(by_hand, 64)
    assert "measured as it is" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_enter_says_that_it_runs_with_the_flags(target: Target, monkeypatch, capsys):
    keyboard, terminal = os.openpty()
    monkeypatch.setattr("sys.stdin", os.fdopen(terminal))
    answers: list[Target] = []
    with serving(target.address[1], None):  # it does not tell its limit
        waiting = threading.Thread(target=lambda: answers.append(begun(ByHand(target, "vllm", {}, ask=True), 64)))
        waiting.start()
        while "(Enter: " not in capsys.readouterr().err:
            pass
        waiting.join(0.5)  # longer than without a terminal
        assert answers == []
        os.write(keyboard, b"\n")
        waiting.join()
    assert answers == [target]


def test_another_model_is_refused(target: Target):
    with serving(target.address[1], 48, model="qwen3-0.6b"):
        with pytest.raises(UserError, match=r"serves qwen3-0.6b = /models/qwen3-0.6b, not --model tiny"):
            check_model(target)
        check_model(Target(target.base_url, "Qwen/Qwen3-0.6B"))
    with pytest.raises(UserError, match="no model in /v1/models"):
        check_model(target)
