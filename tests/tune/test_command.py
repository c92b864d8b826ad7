"""`kit tune` as a user calls it: the JSON of the contract, a kill in the middle, mistakes in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import cli, workload
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.tune.ask import How, Question, answer, carried, emulated, own_flags

KIT = [sys.executable, "-c", "from kit.cli import main; main()", "tune"]
ASKED = ["--model", "qwen3-0.6b", "--gpu", "h100-sxm-80gb", "--slo-ttft-s", "0.5", "--slo-tpot-s", "0.05", "--json"]
ASKED += ["--max-num-batched-tokens", "32"]  # and so no more than 32 at once: quick
KEYS = """
recommended engine_args goodput_requests_per_s slo_attainment_fraction boots evidence limited_by confirmed
""".split()  # noqa: SIM905
QUICK = """
description: Single short calls.
counts: calls
arrivals: {kind: poisson, rate_per_s: 1}
session: {turns: 1, shared_prefix: {tokens: 16}, first_new_tokens: 20, new_tokens: 1, output_len: 4}
sources: [{what: made up, source: this test, date: "2026-11"}]
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A workload that takes a moment, and the load of it."""
    path = tmp_path_factory.mktemp("workload") / "quick.yaml"
    path.write_text(QUICK)
    return ["--workload", str(path), "--sessions", "20", "--burst", "5", "--duration", "1"]


def tuned(*options: str, timeout: float = 120) -> tuple[int, dict[str, Any] | None, str]:
    done = subprocess.run([*KIT, *options], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def test_the_keys_of_the_contract_in_virtual_time(quick, tmp_path):
    code, result, err = tuned(*ASKED, *quick, "--simulate", "--truth", "3", "--out", str(tmp_path))
    assert (code, result["confirmed"], result["status"]) == (0, True, "resolved"), err
    assert set(KEYS) <= result.keys()
    assert result["recommended"]["max_num_seqs"] == int(result["engine_args"]["--max-num-seqs"])
    assert 2 <= result["boots"] <= 3
    assert len(result["evidence"]) == err.count("in time")
    again, second, err = tuned(*ASKED, *quick, "--simulate", "--truth", "3", "--out", str(tmp_path))
    assert (again, second, err) == (0, result, "")  # all of it was kept
    code, second, err = tuned(*ASKED, *quick, "--simulate", "--truth", "4", "--out", str(tmp_path))
    assert (code, second) == (2, None)
    assert err == f"kit: {tmp_path}/tuning.jsonl holds a tuning with another truth\n"


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "tuning.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def test_killed_in_the_middle_it_goes_on(quick, tmp_path):
    call = [*KIT, *ASKED, *quick, "--emulate", "--truth", "3", "--out", str(tmp_path)]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(before := lines(tmp_path)) < 4:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = lines(tmp_path)
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    result, after = json.loads(done.stdout), lines(tmp_path)
    assert after[: len(before)] == before
    levels = [(one["boot"], one["kind"], one["concurrency"], one["seed"]) for one in after if "kind" in one]
    assert len(set(levels)) == len(levels) == len(result["evidence"])
    starts = [one["flags"]["max_num_seqs"] for one in after if "flags" in one]
    assert len(set(starts)) == len(starts) == result["boots"]
    assert result["evidence"][0]["running_mean"] is not None
    if Path("/proc/self").exists():  # the engines of both calls are gone
        waited = time.monotonic() + 15
        while emulators(tmp_path) and time.monotonic() < waited:
            time.sleep(0.1)
        assert emulators(tmp_path) == []


def emulators(folder: Path) -> list[str]:
    """Living processes that write a log into this folder."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


def test_limits_below_one_unloaded_request_are_an_answer(quick):
    limits = [*ASKED[:4], "--slo-ttft-s", "0.0001", "--slo-tpot-s", "0.00001", "--json"]
    code, result, err = tuned(*limits, *quick, "--simulate")
    assert (code, result["status"], result["limited_by"], result["confirmed"]) == (0, "infeasible", "slo", False), err
    assert result["recommended"] == {}
    assert any("one turn alone takes" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of: --engine-command, --base-url, --emulate, --simulate"),
        (["--simulate", "--emulate"], "give one of"),
        (["--base-url", "http://127.0.0.1:9", "--truth", "1"], "--truth SEED needs --emulate or --simulate"),
        (["--engine-command", "serve me"], "no {flags} in it"),
        (["--engine-command", "no-such-program {flags}"], "no program 'no-such-program'"),
        (["--base-url", "http://127.0.0.1:9"], "--base-url http://127.0.0.1:9: no model in /v1/models"),
        (["--base-url", "127.0.0.1:9"], "want http://HOST:PORT"),
        (["--simulate", "--max-boots", "0"], "--max-boots '0'"),
        (["--engine-command", "sh -c 'echo ValueError: no room; exit 3' {flags} --port {port}"], "ValueError: no room"),
    ],
)
def test_mistakes_are_one_line(options, told, quick, tmp_path, monkeypatch, capsys):
    arguments = [*ASKED, *quick, "--out", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", ["kit", "tune", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("kit: ")
    assert told in err.splitlines()[-1]


def test_a_recorded_tuning_is_read_without_a_machine(tmp_path):
    question = Question(
        "qwen3-0.6b", "h100-sxm-80gb", EngineConfig(max_num_batched_tokens=32), "voice", "simulate", "", 3
    )
    result = answer(replace(question, duration_s=20.0), tmp_path, How())
    read = answer(Question(question.model, question.gpu, question.config, "voice", "recorded"), tmp_path, How())
    assert (read.recommended, read.evidence) == (result.recommended, result.evidence)
    assert emulated(replace(question, way="recorded"), tmp_path)  # nothing of it is a measured speed
    text = (tmp_path / "tuning.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tuning.jsonl").write_text("".join(text[:4]))
    with pytest.raises(UserError, match="its tuning is not complete"):
        answer(replace(question, way="recorded"), tmp_path, How())


def test_the_load_is_a_share_of_what_closed_loops_carried():
    def level(concurrency: int, rate: float) -> SimpleNamespace:
        told = {"kind": "closed", "concurrency": concurrency, "requests_per_s": rate, "goodput_requests_per_s": rate}
        return SimpleNamespace(**told)

    single = workload.load("burst-10000")  # of one turn: a session is a turn
    assert carried(single, 60.0, [level(1, 2.0), level(8, 10.0)], 0.8) == 480
    turns = workload.load("coding-agent")  # pauses of seconds to minutes: few turns of a session fall into a minute
    assert 480 / 20 < carried(turns, 60.0, [level(8, 10.0)], 0.8) < 480 / 1.5
    question = Question("qwen3-0.6b", "h100-sxm-80gb", EngineConfig(), "silent-hour-then-500", "simulate")
    offer = question.offer([])
    assert len(offer.arriving(1)) == 500  # without the hour before
    assert offer.arriving(1)[0].arrival_s == 0


def test_the_users_own_flags_go_along():
    config = EngineConfig(gpu_count=2, enforce_eager=True, max_model_len=8192, max_num_seqs=64, quantization="fp8")
    question = Question("llama-3.1-8b", "h100-sxm-80gb", config, "simple-chat", "simulate")
    wanted = {"tensor_parallel_size": 2, "quantization": "fp8", "max_model_len": 8192, "enforce_eager": True}
    assert own_flags(question) == wanted  # max_num_seqs is what is tuned
