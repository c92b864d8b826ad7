"""The load generator and `kit load` against small real servers."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sse_server import HEAD, chunk, event, paced, serving, status, token, usage

from kit.errors import UserError
from kit.loadgen import Level, Options, Target, fixed_sessions, level, measure
from kit.loadgen.prompts import Conversation, PromptModel
from kit.loadgen.selfcheck import OwnLag, verdict
from kit.loadgen.summary import attainment
from kit.metrics import Requests
from kit.workload import Session, Turn
from kit.workload.arrivals import Renewal

KEYS = """
verdict verdict_reasons sent completed failed failures peak_in_flight
duration_s send_lag_s loop_lag_s ttft_s ttft_scheduled_s ttft_answer_s tpot_s
itl_s e2el_s output_tokens output_tokens_per_s requests_per_s offered_requests_per_s goodput_requests_per_s
slo_attainment_fraction slo_attainment_interval burst server gpu equivalents
""".split()  # noqa: SIM905
KIT = [sys.executable, "-c", "from kit.cli import main; main()", "load"]


def run(server: Any, kind: str, value: float, **more: Any) -> dict[str, Any]:
    """One level of short requests, measured."""
    source = more.pop("source", fixed_sessions(60, more.pop("output_len", 3)))
    target = Target(server.base_url, "m", **more.pop("target", {}))
    options = Options(log=lambda line: None, **more.pop("options", {}))
    out = more.pop("out", None)
    return measure(target, [level(kind, value, source, **more)], options, out, {"v": 1})[0]


def attained(got: dict[str, Any]) -> float:
    """The counted attainment, whatever this machine's other work made of the verdict."""
    share: float | None = got["slo_attainment_fraction"]
    return got["slo_attainment_not_valid"] if share is None else share


def cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **(env or {})}
    command = [*KIT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=everything, check=False)


def test_burst_is_in_flight_together_and_times_are_the_servers() -> None:
    with serving(paced(0.3, 0.02)) as server:
        got = run(server, "burst", 40, output_len=10, options={"slo_ttft_s": 2.0})
    assert (got["sent"], got["completed"], got["failed"], got["peak_in_flight"]) == (40, 40, 0, 40)
    assert server.peak == 40
    assert got["ttft_s"]["p50"] > 0.29
    assert got["tpot_s"]["mean"] > 0.018
    assert got["ttft_scheduled_s"]["p50"] >= got["ttft_s"]["p50"]
    assert got["output_tokens"] == 400
    assert attained(got) == 1.0
    assert got["burst"]["largest_passing_burst"] == (40 if got["verdict"] == "VALID" else None)
    assert got["read_lag_s"]["p99"] is not None
    assert got["server"]["running"] is None


def test_results_larger_than_a_pipe_come_back() -> None:
    with serving(paced(0.01, 0.0)) as server:
        got = run(server, "burst", 50, output_len=600)
    assert (got["completed"], got["itl_s"]["n"]) == (50, 50 * 599)


def test_closed_loop_keeps_its_slots_busy() -> None:
    with serving(paced(0.02, 0.005)) as server:
        got = run(server, "concurrency", 3, requests=12, options={"workers": 2})
    assert got["completed"] == 12
    assert server.peak == got["peak_in_flight"] == 3


def test_closed_loop_by_duration_repeats_with_new_texts() -> None:
    with serving(paced(0.01, 0.0)) as server:
        got = run(server, "concurrency", 2, duration_s=0.5)
    assert got["completed"] > 4
    texts = [request["messages"][0]["content"] for request in server.requests]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_closed_loop_ends_after_so_many_turns(workers: int, tmp_path: Path) -> None:
    one = Level("c", [Session(key, 0.0, [Turn(20, 2)] * 3) for key in range(40)], "concurrency", 4, slots=4, turns=17)
    with serving(paced(0.02, 0.005)) as server:
        (got,) = measure(Target(server.base_url, "m"), [one], Options(workers=workers), tmp_path)
    assert got["peak_in_flight"] == 4
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert 17 <= len(rows) <= 20  # those that ended as the last one was sent
    assert len(rows) == len({(row["session"], row["turn"]) for row in rows})
    assert {row["turn"] for row in rows} == {0, 1, 2}


def test_rate_sends_every_request_of_the_drawn_schedule(tmp_path: Path) -> None:
    with serving(paced(0.01, 0.0)) as server:
        got = run(server, "request_rate", 100.0, duration_s=1.0, seed=5, out=tmp_path)
    times = Renewal(kind="poisson", rate_per_s=100.0).times(np.random.default_rng(5))
    drawn = [at for at in islice(times, 400) if at <= 1.0]
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    planned = sorted(line["scheduled_s"] for line in lines)
    assert got["sent"] == len(drawn) == len(planned)
    assert np.abs(np.array(planned) - np.array(drawn)).max() < 2e-6
    assert got["offered_requests_per_s"] == pytest.approx(100, rel=0.4)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_gaps_have_the_asked_variation(burstiness: float) -> None:
    plan = level("request_rate", 20.0, fixed_sessions(10, 10), requests=20_000, burstiness=burstiness, seed=1)
    gaps = np.diff([session.arrival_s for session in plan.sessions])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.1)


def test_coordinated_omission_shows_on_the_schedule() -> None:
    """Capacity 1, 100 ms of service, 50 requests/s, capped at one in flight by the client."""
    with serving(paced(0.1, 0.0, 1)) as server:
        got = run(
            server, "request_rate", 50.0, requests=20, max_concurrency=1, output_len=1,
            options={"slo_ttft_s": 0.5},
        )  # fmt: skip
    assert server.peak == 1
    assert got["ttft_scheduled_s"]["p90"] > got["ttft_s"]["p90"] + 1.0
    assert got["e2el_scheduled_s"]["p90"] > got["e2el_s"]["p90"] + 1.0
    assert attained(got) < 0.5


def test_a_queue_in_the_server_is_in_both_clocks() -> None:
    """One request at a time on the server's side: nothing waits in the client."""
    gate = asyncio.Semaphore(1)

    async def one_at_a_time(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        async with gate:
            await paced(0.1, 0.0)(request, writer)

    with serving(one_at_a_time) as server:
        got = run(server, "request_rate", 50.0, requests=15, output_len=1)
    assert got["ttft_s"]["p90"] > 0.8
    assert got["ttft_scheduled_s"]["p90"] > 0.8
    assert got["completed"] == 15


@pytest.mark.parametrize("code", [429, 503, 529])
def test_refusals_are_misses(code: int) -> None:
    async def half(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        n[0] += 1
        good = n[0] % 2 or request["max_tokens"] == 1
        await (paced(0.01, 0.001) if good else status(code))(request, writer)

    n = [0]
    with serving(half) as server:
        got = run(server, "burst", 100, options={"slo_ttft_s": 30.0})
    assert got["failures"] == {f"http_{code}": 50}
    assert attained(got) == 0.5
    assert got["burst"]["shed_fraction"] == 0.5
    assert got["ttft_s"]["p90"] is None
    assert "misses" in got["ttft_s"]["nulls"]["p90"]


async def _garbage(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xffnot http at all\r\n\r\n")
    await writer.drain()


async def _silent(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def _error(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(event(token("a"))) + chunk(event({"error": {"message": "x"}})))
    writer.write(chunk(event(b"[DONE]")) + b"0\r\n\r\n")
    await writer.drain()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(_garbage, "garbage"), (_silent, "timeout"), (_error, "error_in_stream")],
)
def test_bad_answers_cost_nothing_else(bad: Any, reason: str) -> None:
    """Every third request meets the bad behaviour, the others are measured as if alone."""

    async def some(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (bad if request["n"] % 3 == 0 else paced(0.02, 0.01))(request, writer)

    count = iter(range(-2, 1000))

    async def numbered(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        n = next(count)
        request["n"] = n if n >= 0 else 1
        await some(request, writer)

    with serving(numbered) as server:
        got = run(server, "burst", 30, target={"timeout_s": 1.0})
    assert got["failures"] == {reason: 10}
    assert got["completed"] == 20
    assert got["ttft_s"]["mean"] < 0.5


def test_a_server_that_closes_at_any_byte() -> None:
    answer = HEAD + chunk(event(token("a"))) + chunk(event(token("b"))) + chunk(event(usage(9, 2)))
    answer += chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    count = iter(range(-2, len(answer) + 1))

    async def cut(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        n = next(count)
        writer.write(answer if n < 0 else answer[:n])
        await writer.drain()
        if n >= 0:
            writer.close()

    with serving(cut) as server:
        got = run(server, "burst", len(answer) + 1, output_len=2)
    assert got["completed"] + got["failed"] == len(answer) + 1
    assert got["failures"]["closed"] == len(HEAD)  # no complete head: no answer
    assert set(got["failures"]) <= {"closed", "cut", "not_a_stream"}
    assert got["completed"] >= 1


def test_answers_split_at_every_byte_on_the_wire() -> None:
    async def bytewise(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        text = HEAD + chunk(event(token("a"))) + chunk(event(usage(9, 1)))
        for byte in text + chunk(event(b"[DONE]")) + b"0\r\n\r\n":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)

    with serving(bytewise) as server:
        got = run(server, "concurrency", 2, requests=6, output_len=1, target={"timeout_s": 20.0})
    assert got["completed"] == 6


def test_a_server_that_closes_after_each_answer_is_reconnected() -> None:
    async def once(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await paced(0.01, 0.0)(request, writer)
        writer.close()

    with serving(once) as server:
        got = run(server, "concurrency", 4, requests=40)
    assert (got["completed"], got["failed"]) == (40, 0)


def test_turns_share_their_prefix_and_wait_for_children() -> None:
    child = Session(0, 0.05, [Turn(10, 2)])
    turns = [Turn(40, 3, pause_after_s=0.1, children=[child]), Turn(12, 2), Turn(5, 2)]
    two = [Session(key, 0.0, turns, prefix_id=7, shared_prefix_tokens=50) for key in range(2)]
    with serving(paced(0.01, 0.005)) as server:
        got = run(server, "burst", 2, source=lambda n: two)
    assert got["sent"] == got["completed"] == 8
    asked = [request["messages"] for request in server.requests[3:]]  # after the probes, one with a system message
    assert len({json.dumps(messages[0]) for messages in asked if messages[0]["role"] == "system"}) == 1
    longest = max(asked, key=len)
    assert [m["role"] for m in longest] == ["system", *["user", "assistant"] * 2, "user"]
    assert longest[2]["content"] == " tok tok tok"
    shorter = [m for m in asked if 1 < len(m) < len(longest) and m == longest[: len(m)]]
    assert len(shorter) == 2
    second = next(i for i, m in enumerate(asked) if len(m) == 4)
    assert sum(len(m) == 1 for m in asked[:second]) >= 1  # a child came before the second turn


def test_a_failed_turn_ends_its_session() -> None:
    count = iter(range(1000))

    async def second_fails(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        fails = len(request["messages"]) > 1 and next(count) >= 0
        await (status(503) if fails else paced(0.01, 0.0))(request, writer)

    turns = [Turn(40, 2), Turn(12, 2), Turn(5, 2), Turn(5, 2)]
    with serving(second_fails) as server:
        got = run(server, "burst", 1, source=lambda n: [Session(0, 0.0, turns)])
    assert got["failures"] == {"http_503": 1}
    assert got["unsent_turns"] == 2


def test_prompts_have_the_asked_length_and_a_salt_per_run() -> None:
    with serving(paced(0.01, 0.0)) as server:
        got = run(server, "burst", 5, source=fixed_sessions(300, 2))
        run(server, "burst", 5, source=fixed_sessions(300, 2))
    lengths = [len(r["messages"][0]["content"].split()) + 5 for r in server.requests]
    assert lengths[2:7] == [300] * 5
    assert not got["warnings"]
    starts = {r["messages"][0]["content"].split(" ", 8)[7] for r in server.requests}
    texts = {r["messages"][0]["content"][:60] for r in server.requests}
    assert len(texts) == len(server.requests)
    assert len(starts) > 1


def test_length_of_the_answer_is_asked_for_and_verified() -> None:
    with serving(paced(0.01, 0.0, 4)) as server:
        got = run(server, "burst", 5, output_len=7)
    last = server.requests[-1]
    assert (last["max_tokens"], last["min_tokens"], last["ignore_eos"]) == (7, 7, True)
    assert last["stream_options"] == {"include_usage": True}
    assert "5 of 5 answers have another length than asked: mean 4.0" in got["warnings"]


def test_a_server_without_engine_fields_is_asked_without() -> None:
    async def strict(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (status(400) if "ignore_eos" in request else paced(0.01, 0.0))(request, writer)

    with serving(strict) as server:
        got = run(server, "burst", 3)
    assert got["completed"] == 3
    assert any("ignore_eos" in warning for warning in got["warnings"])


def test_completions_endpoint() -> None:
    async def complete(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        one = {"choices": [{"index": 0, "text": " x", "finish_reason": None}]}
        parts = [event(one), event(one), event(usage(len(request["prompt"].split()), 2))]
        writer.write(HEAD + b"".join(map(chunk, [*parts, event(b"[DONE]")])) + b"0\r\n\r\n")

    with serving(complete) as server:
        got = run(server, "burst", 3, output_len=2, target={"endpoint": "completions"})
    assert got["completed"] == 3
    assert server.heads[0].startswith("POST /v1/completions ")


def test_trace_paths_share_text() -> None:
    prompts = PromptModel(1)
    one = Conversation(Session(0, 0.0, [Turn(100, 1)], path=((3, 40), (9, 90))), prompts)
    two = Conversation(Session(1, 0.0, [Turn(100, 1)], path=((3, 40), (8, 90))), prompts)
    for conversation in (one, two):
        conversation.ask()
    texts = [c.messages[0][1].split() for c in (one, two)]
    assert [len(text) for text in texts] == [100, 100]
    assert texts[0][:40] == texts[1][:40]
    assert texts[0][40:48] != texts[1][40:48]


def test_tls_and_cold_connects_are_reported_apart(tmp_path: Path) -> None:
    pem = tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(pem), "-out", str(tmp_path / "c.pem")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    pem.write_text(pem.read_text() + (tmp_path / "c.pem").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with serving(paced(0.02, 0.005), context) as server:
        env = {"SSL_CERT_FILE": str(pem)}
        common = ["--base-url", server.base_url, "--model", "m", "--input-tokens", "50"]
        common += ["--output-tokens", "3", "--burst", "5", "--json"]
        warm = json.loads(cli(*common, env=env).stdout)
        cold = json.loads(cli(*common, "--cold-connects", env=env).stdout)
        refused = cli(*common)
    assert warm["completed"] == cold["completed"] == 5
    assert warm["connect_s"]["before_the_run"]["n"] == 5
    assert cold["connect_s"]["before_the_run"]["n"] == 0
    assert cold["connect_s"]["within_requests"]["n"] == 5
    assert refused.returncode == 2
    assert "certificate" in refused.stderr.lower()


def test_server_metrics_and_histogram() -> None:
    with serving(paced(0.05, 0.001)) as server:
        server.metrics = (
            '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 7.0\n'
            "vllm:kv_cache_usage_perc 0.25\nvllm:num_preemptions_total 3\n"
        )
        got = run(server, "burst", 3)
    assert got["server"]["running"] == 7.0
    assert got["server"]["kv_cache_usage"] == 0.25
    assert got["server"]["preemptions"] == 0.0
    assert got["server"]["waiting"] is None
    assert got["server"]["prefix_hit_fraction"] is None


def _requests(n: int, ttft_s: float, late_s: float = 0.0) -> Requests:
    zero, one = np.zeros(n), np.ones(n)
    first = one * (ttft_s + late_s)
    return Requests(zero, zero + late_s, first, first + 1, first + 1, one * 50, one > 0)


def _own(read: float, send: float = 0.0, cpu: float = 0.3, stamped: bool = True) -> OwnLag:
    lags = np.full(1000, read)
    return OwnLag(lags, lags if stamped else lags[:0], np.full(1000, send), [cpu])


@pytest.mark.parametrize(
    ("own", "slo", "server", "word"),
    [
        (_own(0.002), None, {}, ""),
        (_own(0.040), None, {}, ""),  # a quarter of 200 ms would be 50 ms
        (_own(0.060), None, {}, "read lag"),
        (_own(0.060, stamped=False), None, {}, "loop lag"),
        (_own(0.002, send=0.06), None, {}, "send lag"),
        (_own(0.002, cpu=0.95), None, {}, "95% of a core"),
        (_own(0.002), None, {"ttft_mean_s": 0.05}, ""),  # stamps show it is not the client
        (_own(0.002, stamped=False), None, {"ttft_mean_s": 0.05}, "server histogram"),
        (_own(0.002, stamped=False), None, {"ttft_mean_s": 0.19}, ""),
    ],
)
def test_verdict(own: OwnLag, slo: float | None, server: dict[str, Any], word: str) -> None:
    plan = level("request_rate", 10.0, fixed_sessions(10, 10), requests=100)
    called, reasons = verdict(plan, _requests(100, 0.2), 0.2, own, slo, server)
    assert called == ("CLIENT_BOUND" if word else "VALID")
    assert word in " ".join(reasons)


def test_a_bound_client_passes_no_slo() -> None:
    good = attainment(_requests(100, 0.2), (0.5, None), "VALID")
    assert (good["slo_attainment_fraction"], good["slo_met"]) == (1.0, True)
    assert good["slo_attainment_interval"] == pytest.approx((0.963, 1.0), abs=1e-3)
    bound = attainment(_requests(100, 0.2), (0.5, None), "CLIENT_BOUND")
    assert (bound["slo_attainment_fraction"], bound["slo_met"]) == (None, False)
    assert bound["goodput_requests_per_s"] is None


def test_misses_of_late_sending_bound_the_client() -> None:
    plan = level("burst", 100, fixed_sessions(10, 10))
    late = _requests(100, 0.2, late_s=0.04)
    assert verdict(plan, late, 0.2, _own(0.001, 0.04), 0.5, {})[0] == "VALID"
    called, reasons = verdict(plan, late, 0.2, _own(0.001, 0.04), 0.22, {})
    assert called == "CLIENT_BOUND"
    assert "late sending" in reasons[0]


def test_a_kill_keeps_what_was_written_and_a_second_start_goes_on(tmp_path: Path) -> None:
    with serving(paced(0.01, 0.01)) as server:
        common = ["--base-url", server.base_url, "--model", "m", "--input-tokens", "50", "--json"]
        common += ["--output-tokens", "3", "--concurrency", "1,4", "--requests", "24"]
        common += ["--out", str(tmp_path)]
        process = subprocess.Popen([*KIT, *common], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        first = tmp_path / "concurrency-1"
        records = tmp_path / "concurrency-4" / "requests.jsonl"
        until = time.monotonic() + 30
        while time.monotonic() < until and not (records.exists() and records.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        assert lines
        assert all(line["ok"] for line in lines)
        done = (first / "summary.json").read_bytes()
        asked = len(server.requests)
        again = json.loads(cli(*common).stdout)
        assert len(server.requests) - asked in (26, 27)  # probes and one level; one was cut
        assert [s["completed"] for s in again["levels"]] == [24, 24]
        assert (first / "summary.json").read_bytes() == done
        assert (records.parent / "requests.interrupted-1.jsonl").exists()
        other = cli(*common, "--seed", "3")
    assert other.returncode == 2
    assert "another seed" in other.stderr
    finished = cli(*common)  # the server is gone, nothing is left to measure
    assert finished.returncode == 0
    assert [s["completed"] for s in json.loads(finished.stdout)["levels"]] == [24, 24]


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    with serving(paced(0.01, 0.05)) as server:
        arguments = ["--base-url", server.base_url, "--model", "m", "--input-tokens", "50"]
        arguments += ["--output-tokens", "20", "--concurrency", "2", "--duration", "60"]
        process = subprocess.Popen([*KIT, *arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 30
        while time.monotonic() < until and len(server.requests) < 4:
            time.sleep(0.02)
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while time.monotonic() < until and server.live:
            time.sleep(0.05)
        asked = len(server.requests)
        time.sleep(0.3)
        assert len(server.requests) == asked


def test_the_key_is_sent_and_appears_nowhere(tmp_path: Path) -> None:
    key = "sk-secret-4711"
    with serving(paced(0.01, 0.0)) as server:
        done = cli(
            "--base-url", server.base_url, "--model", "m", "--input-tokens", "50", "--json",
            "--output-tokens", "3", "--burst", "3", "--api-key-env", "MY_KEY",
            "--out", str(tmp_path / "run"), env={"MY_KEY": key},
        )  # fmt: skip
    assert done.returncode == 0
    assert all(f"Authorization: Bearer {key}" in head for head in server.heads)
    assert key not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not any(key.encode() in path.read_bytes() for path in files)


def test_json_has_the_documented_keys_and_nothing_else_is_on_stdout() -> None:
    with serving(paced(0.01, 0.0)) as server:
        done = cli(
            "--base-url", server.base_url + "/v1", "--model", "m", "--input-tokens", "50",
            "--output-tokens", "3", "--concurrency", "2", "--requests", "4", "--json",
        )  # fmt: skip
    got = json.loads(done.stdout)
    for name in KEYS:
        assert name in got
    for latency in ("ttft_s", "ttft_scheduled_s", "ttft_answer_s", "tpot_s", "itl_s", "e2el_s"):
        assert {"mean", "p50", "p90", "p95", "p99"} <= set(got[latency])
    assert set(got["equivalents"]) == {"vllm", "aiperf", "guidellm"}
    assert got["gpu"] is None or got["gpu"]["gpus"] >= 1


def test_without_uvloop_asyncio_is_used_and_told(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    with serving(paced(0.01, 0.0)) as server:
        common = ["--base-url", server.base_url, "--model", "m", "--burst", "4", "--json"]
        done = cli(*common, *LENGTHS, env={"PYTHONPATH": str(tmp_path)})
    assert json.loads(done.stdout)["completed"] == 4
    assert "uvloop is not installed" in done.stderr


def _cli_levels(workload: str) -> Any:
    """The level that `kit load --workload NAME --requests 3` plans."""
    from kit.cli.load import _levels

    asked = dict.fromkeys(("request_rate", "burst", "concurrency", "trace", "duration"))
    return _levels({**asked, "workload": workload, "requests": 3, "seed": 0, "speed": 1.0})


def test_workloads_and_traces_are_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.000000,90,3\n2024-05-10 00:00:00.400000,70,2\n"
    )
    with serving(paced(0.005, 0.0)) as server:
        common = ["--base-url", server.base_url, "--model", "m", "--json"]
        done = cli(*common, "--trace", str(trace), "--trace-format", "azure")
        got = json.loads(done.stdout)
    assert got["completed"] == 2
    assert [r["max_tokens"] for r in server.requests] == [1, 1, 3, 2]
    assert got["duration_s"] > 0.4
    assert [level.kind for level in _cli_levels("voice")] == ["sessions"]


LENGTHS = ["--input-tokens", "5", "--output-tokens", "5"]
SERVER = ["--base-url", "http://127.0.0.1:9", "--model", "m"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SERVER, *LENGTHS, "--burst", "2"], "cannot reach http://127.0.0.1:9"),
        (["--base-url", "127.0.0.1:9", "--model", "m", *LENGTHS, "--burst", "2"], "--base-url"),
        ([*SERVER, *LENGTHS], "--burst, --concurrency, --request-rate"),
        ([*SERVER, *LENGTHS, "--burst", "0"], "--burst '0'"),
        ([*SERVER, *LENGTHS, "--burst", "ten"], "--burst 'ten'"),
        ([*SERVER, *LENGTHS, "--request-rate", "-1"], "--request-rate '-1'"),
        ([*SERVER, *LENGTHS, "--request-rate", "1", "--burstiness", "0"], "--burstiness 0"),
        ([*SERVER, *LENGTHS, "--burst", "2", "--concurrency", "2"], "exclude each other"),
        ([*SERVER, "--input-tokens", "5", "--burst", "2"], "needed together"),
        ([*SERVER, *LENGTHS, "--workload", "x", "--burst", "2"], "give one of"),
        ([*SERVER, "--workload", "no-such", "--burst", "2"], "no-such"),
        ([*SERVER, "--trace", "none.csv", "--burst", "2"], "--trace-format"),
        ([*SERVER, "--trace", "none.csv", "--trace-format", "azure"], "none.csv"),
        ([*SERVER, *LENGTHS, "--burst", "2", "--api-key-env", "NO_SUCH"], "NO_SUCH"),
        ([*SERVER, *LENGTHS, "--burst", "2", "--endpoint", "embed"], "embed"),
        ([*SERVER, *LENGTHS, "--burst", "2", "--slo-ttft-s", "0"], "--slo-ttft-s must be above 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    import contextlib
    import io

    from kit.cli import _call

    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(UserError) as error:
        _call("load", [*arguments, "--json"])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_model_or_key_is_bad_input() -> None:
    with serving(status(404, b'{"error":{"message":"no model x"}}')) as server:
        done = cli("--base-url", server.base_url, "--model", "x", *LENGTHS, "--burst", "2")
    assert done.returncode == 2
    assert "no model x" in done.stderr
    assert "Traceback" not in done.stderr


def test_descriptors_are_raised_or_the_command_that_raises_them_is_named() -> None:
    code = "import resource as r, runpy; r.setrlimit(r.RLIMIT_NOFILE, ({0}, {1}));"
    code += "from kit.cli import main; main()"
    with serving(paced(0.01, 0.0)) as server:
        many = ["load", "--base-url", server.base_url, "--model", "m", *LENGTHS, "--burst", "300"]

        def limited(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", code.format(soft, hard), *many, "--json"]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        refused, raised = limited(128, 200), limited(128, 1000)
    assert refused.returncode == 2
    assert "prlimit --pid $$ --nofile=364:364" in refused.stderr
    assert json.loads(raised.stdout)["completed"] == 300
