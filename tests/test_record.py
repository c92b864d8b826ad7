"""kit record between real clients and the emulator: what passes, what is written, what is never written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from kit import workload
from kit.errors import UserError
from kit.record import Recorder, Sessions, upstream
from kit.record.calls import Asked, chain
from kit.record.proxy import Answer
from kit.traces import read

KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
KEY, SECRET = "sk-never-written", "nobody writes this sentence down"
MODEL = "llama-3.1-8b"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"n": {"type": "integer"}}}}}]


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A kit server on a free port and its base URL; stopped with SIGINT."""
    command = [*KIT, *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["base_url"]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with started("emulate", "--model", MODEL, "--gpu", "h100-sxm-80gb", "--pace", "20,2") as (_, url):
        yield url


@contextmanager
def recorded(engine: str, out: Path, *more: str) -> Iterator[str]:
    with started("record", "--upstream", engine, "--out", str(out), *more) as (_, url):
        yield url


def ask(
    url: str, path: str = "/v1/chat/completions", headers: Any = (), **body: Any
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request; a POST where there is a body."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **dict(headers)}
    asked = {"model": MODEL, "max_tokens": 8, "ignore_eos": True, **body}
    connection.request("POST" if body else "GET", path, json.dumps(asked) if body else None, sent)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["kit_recording"] == 1
    return lines[1:]


def events(body: bytes) -> list[dict[str, Any]]:
    """A stream's events without what differs from call to call."""
    found = [json.loads(part[6:]) for part in body.decode().split("\n\n") if part.startswith("data: {")]
    return [{name: value for name, value in one.items() if name not in ("id", "created")} for one in found]


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["without usage", "with"])
def test_a_stream_passes_unchanged(engine: str, tmp_path: Path, options: Any) -> None:
    asked = {"messages": [user("how are you")], "stream": True, **options}
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        direct, passed = ask(engine, **asked), ask(proxy, **asked)
    assert passed[0] == 200
    assert events(passed[2]) == events(direct[2])
    assert passed[2].endswith(b"data: [DONE]\n\n")
    assert ("usage" in events(passed[2])[-1]) == bool(options)
    (row,) = rows(tmp_path / "r.jsonl")
    assert (row["output_tokens"], row["failure"], row["finish_reason"]) == (8, None, "length")
    assert row["input_tokens"] == json.loads(ask(engine, messages=[user("how are you")])[2])["usage"]["prompt_tokens"]
    assert 0 <= row["start_s"] < row["first_token_s"] < row["end_s"]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/nothing"])
def test_everything_else_passes_unrecorded(engine: str, tmp_path: Path, path: str) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        direct, passed = ask(engine, path), ask(proxy, path)
    assert passed[:2] == direct[:2]
    if path != "/metrics":
        assert passed[2] == direct[2]
    assert rows(tmp_path / "r.jsonl") == []


def test_a_whole_answer_and_a_refusal_are_told_apart(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        assert json.loads(ask(proxy, messages=[user("a")])[2])["usage"]["completion_tokens"] == 8
        assert ask(proxy, messages=[user("a")], model="other")[0] == 404
        assert ask(proxy, messages="nonsense")[0] == 400
    good, *bad = rows(tmp_path / "r.jsonl")
    assert (good["output_tokens"], good["failure"], good["first_token_s"]) == (8, None, None)
    assert [(row["failure"], row["output_tokens"]) for row in bad] == [("http_404", 0), ("http_400", 0)]
    assert len(read(str(tmp_path / "r.jsonl"), "recorded").calls) == 1


def test_chunks_are_not_held_back(tmp_path: Path) -> None:
    slow = started("emulate", "--model", MODEL, "--gpu", "h100-sxm-80gb", "--pace", "10,150")
    with slow as (_, url), recorded(url, tmp_path / "r.jsonl") as proxy:
        sock = socket.create_connection((urlsplit(proxy).hostname, urlsplit(proxy).port))
        body = json.dumps({"messages": [user("x")], "max_tokens": 5, "ignore_eos": True, "stream": True})
        sock.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        reads = 0
        while not sock.recv(65536).endswith(b"0\r\n\r\n"):
            reads += 1
        sock.close()
    assert reads >= 4


def test_no_content_and_no_key_is_written(engine: str, tmp_path: Path) -> None:
    asked = {"messages": [{"role": "system", "content": SECRET}, user(SECRET)], "tools": TOOLS, "stream": True}
    for name, more in (("without", ()), ("with", ("--content",))):
        with recorded(engine, tmp_path / name, *more) as proxy:
            ask(proxy, **asked)
        text = (tmp_path / name).read_text()
        assert KEY not in text
        assert (SECRET in text) == (name == "with")
        assert oct((tmp_path / name).stat().st_mode)[-3:] == "600"


def converse(proxy: str, *, headers: Any = ()) -> None:
    """An agent's session: a tool asked for, called, its result told, and a question more."""
    messages: list[Any] = [{"role": "system", "content": "be kind " * 40}, user("look it up")]
    for _ in range(2):
        answer = json.loads(ask(proxy, headers=headers, messages=messages, tools=TOOLS)[2])["choices"][0]["message"]
        messages.append(answer)
        for call in answer.get("tool_calls") or []:
            time.sleep(0.15)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "found"})
    ask(proxy, headers=headers, messages=[*messages, user("and then?")], tools=TOOLS)


def test_sessions_are_found_by_their_messages(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        converse(proxy)
        converse(proxy)
    found = rows(tmp_path / "r.jsonl")
    assert [row["session"] for row in found] == ["s1"] * 3 + ["s2"] * 3
    assert [row["tool_results"] for row in found[:3]] == [0, 1, 0]
    assert len({row["prefix"] for row in found}) == 1
    one, two = workload.generate(workload.load(str(tmp_path / "r.jsonl")), 0)
    assert one.prefix_id == two.prefix_id
    assert one.input_lens() == [row["input_tokens"] for row in found[:3]]
    assert one.turns[0].pause_after_s > 0.15
    assert [turn.pause_kind for turn in one.turns] == ["tool", "human", ""]
    assert one.shared_prefix_tokens > 80  # of about 100 in the system prompt and the tools


def test_headers_tell_sessions_and_parents(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        lead = {"x-session-id": "lead"}
        ask(proxy, headers=lead, messages=[user("plan")])
        for name in ("a", "b"):
            converse(proxy, headers={"x-session-id": name, "x-parent-session-id": "lead"})
        ask(proxy, headers=lead, messages=[user("plan"), {"role": "assistant", "content": "x"}, user("sum up")])
    assert "x-session-id" not in (tmp_path / "r.jsonl").read_text()
    (session,) = workload.generate(workload.load(str(tmp_path / "r.jsonl")), 0)
    assert [len(turn.children) for turn in session.turns] == [2, 0]
    first, second = session.turns[0].children
    assert len(first.turns) == len(second.turns) == 3
    assert 0 <= first.arrival_s < second.arrival_s
    assert session.turns[0].pause_after_s < 0.15  # counted from the end of the last sub-agent


def test_a_killed_recording_can_be_read(engine: str, tmp_path: Path) -> None:
    with started("record", "--upstream", engine, "--out", str(tmp_path / "r.jsonl")) as (process, proxy):
        ask(proxy, messages=[user("a")])
        ask(proxy, messages=[user("b")])  # by now the first one's row is on disk
        process.kill()
    assert len(rows(tmp_path / "r.jsonl")) in (1, 2)


def test_ctrl_c_ends_well(engine: str, tmp_path: Path) -> None:
    with started("record", "--upstream", engine, "--out", str(tmp_path / "r.jsonl")) as (process, proxy):
        ask(proxy, messages=[user("a")])
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "1 calls" in said
    assert "Traceback" not in said


def test_a_dead_upstream_is_a_502_and_the_next_one_serves(tmp_path: Path) -> None:
    slow = started("emulate", "--model", MODEL, "--gpu", "h100-sxm-80gb", "--pace", "20,200")
    with slow as (server, url), recorded(url, tmp_path / "r.jsonl") as proxy:
        ask(proxy, messages=[user("a")], max_tokens=1)
        client = Thread(target=ask, args=(proxy,), kwargs={"messages": [user("b")], "max_tokens": 50})
        client.start()
        time.sleep(0.6)
        server.kill()
        server.wait()
        client.join(20)
        assert ask(proxy, messages=[user("c")])[0] == 502
    assert [row["failure"] for row in rows(tmp_path / "r.jsonl")] in (
        [None, cut, "connect"] for cut in ("cut", "connect")
    )


def test_a_client_that_leaves_is_told(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        sock = socket.create_connection((urlsplit(proxy).hostname, urlsplit(proxy).port))
        body = json.dumps({"messages": [user("x")], "max_tokens": 500, "ignore_eos": True, "stream": True})
        sock.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        while b"data:" not in sock.recv(4096):
            pass
        sock.close()
        for _ in range(100):
            if len((tmp_path / "r.jsonl").read_text().splitlines()) == 2:
                break
            time.sleep(0.05)
    (row,) = rows(tmp_path / "r.jsonl")
    assert row["failure"] == "client_left"
    assert 0 < row["output_tokens"] < 500
    assert row["estimated"]


def test_a_replay_has_the_same_calls_and_tokens(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        for number in range(3):
            converse(proxy, headers={"x-session-id": f"n{number}"})
    options = ["--workload", str(tmp_path / "r.jsonl"), "--speed", "100", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*KIT, "load", "--base-url", engine, "--model", MODEL, *options], capture_output=True, text=True
    )
    got = json.loads(done.stdout)
    assert (got["sent"], got["completed"]) == (9, 9)
    sent = [json.loads(line) for line in (tmp_path / "out/requests.jsonl").read_text().splitlines()]
    was = {
        (f"{number}", turn): row
        for number in range(3)
        for turn, row in enumerate(rows(tmp_path / "r.jsonl")[3 * number :][:3])
    }
    for one in sent:
        row = was[one["session"], one["turn"]]
        assert one["prompt_tokens"] == pytest.approx(row["input_tokens"], rel=0.01)
        assert one["output_tokens"] == row["output_tokens"]


def test_simulate_and_more_sessions_than_recorded(engine: str, tmp_path: Path) -> None:
    with recorded(engine, tmp_path / "r.jsonl") as proxy:
        converse(proxy)
    command = [*KIT, "simulate", "--model", MODEL, "--gpu", "h100-sxm-80gb", "--workload", str(tmp_path / "r.jsonl")]
    done = subprocess.run([*command, "--sessions", "20", "--json"], capture_output=True, text=True)
    got = json.loads(done.stdout)
    assert (got["completed"], got["refused"], got["unfinished"]) == (60, 0, 0)
    assert got["prefix_hit_fraction"] > 0.5


# --- parts -----------------------------------------------------------------------------------------


def test_usage_is_hidden_however_the_stream_is_cut() -> None:
    shown = [b'data: {"choices":[{"delta":{"content":"\\"usage\\": {"}}]}\n\n', b": ping\n\n", b"data: [DONE]\n\n"]
    told = b'data: {"id":1,"choices":[],"usage":{"prompt_tokens":3}}\n\n'
    for stream in (b"".join([*shown[:2], told, shown[2]]), b"".join([told, *shown]).replace(b"\n", b"\r\n")):
        for size in (1, 7, 1000):
            sent: list[bytes] = []
            answer = Answer.__new__(Answer)
            answer.held, answer.hides, answer.framed = b"", True, True
            answer.client = type("Fake", (), {"write": staticmethod(sent.append)})
            for at in range(0, len(stream), size):
                answer._pass_on(stream[at : at + size])
            answer._pass_on(b"", end=True)
            assert b"".join(sent) == stream.replace(told, b"").replace(told.replace(b"\n", b"\r\n"), b"")


def test_the_same_question_asked_twice_is_two_sessions() -> None:
    sessions, hashes = Sessions(), chain([user(text) for text in "abc"])
    assert [sessions.identify("", "", hashes[:1])[0] for _ in range(2)] == ["s1", "s2"]
    assert [sessions.identify("", "", hashes)[0] for _ in range(3)] == ["s1", "s2", "s3"]


def test_a_request_that_is_no_json_has_a_session_all_the_same() -> None:
    for body in (b"", b"[1]", b'{"messages": "x"}', b'{"messages": [1]}', b"\xff"):
        asked = Asked(body, [], Sessions())
        assert asked.told["session"] == "s1"
        assert asked.counted({}, 0)["input_tokens"] >= 1


def test_a_full_disk_stops_the_recording_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(upstream_of_nothing(), tmp_path / "r.jsonl")
    os.close(recorder.file)
    recorder.file = os.open("/dev/full", os.O_WRONLY)
    answer = Answer.__new__(Answer)
    answer.began_s, answer.times, answer.usage, answer.reason, answer.status = 0.0, [], {}, None, 200  # type: ignore[assignment]
    answer._is_events, answer.finish_reason = False, None
    recorder.write(answer, Asked(b"{}", [], Sessions()))
    assert "not recorded: No space left" in capsys.readouterr().err


def upstream_of_nothing() -> Any:
    from kit.loadgen.plan import Target

    return Target("http://127.0.0.1:1", "")


def test_a_client_that_closes_after_the_last_event_has_its_answer(tmp_path: Path) -> None:
    recorder = Recorder(upstream_of_nothing(), tmp_path / "r.jsonl")
    for done, failure in ((True, None), (False, "client_left")):
        answer = Answer.__new__(Answer)
        answer.connection = answer.reason = None
        answer.done, answer.times, answer.status, answer._is_events = done, [1.0], 200, True  # type: ignore[assignment]
        answer.over = lambda: None  # type: ignore[method-assign]
        recorder.cancel(answer)
        assert answer.failure() == failure


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "127.0.0.1:80", "http://"])
def test_a_bad_upstream_is_named(url: str) -> None:
    with pytest.raises(UserError, match="--upstream"):
        upstream(url)


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*r.jsonl: File exists"):
        Recorder(upstream_of_nothing(), tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == "mine"


def test_a_broken_line_of_a_recording_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"kit_recording": 1}\n{"session": "a"}\n')
    with pytest.raises(UserError, match=r"r.jsonl line 2: 'start_s'"):
        workload.load(str(tmp_path / "r.jsonl"))
