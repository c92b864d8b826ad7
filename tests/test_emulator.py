"""The emulator over real sockets, and its schedule against the simulator's."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit import catalog
from kit.emulator import Api, clock, hide, server
from kit.emulator.page import Page
from kit.emulator.server import Connection, Generation, listen
from kit.emulator.text import PrefixTree, example, words
from kit.engine_config import EngineConfig, ResolvedConfig, resolve
from kit.scheduler import Request, SchedulerConfig
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig
from kit.workload import Session, Turn

SHARED = Path(os.environ.get("KIT_SHARED", Path(__file__).parents[2] / "shared"))
KIT = [sys.executable, "-c", "from kit.cli import main; main()"]


@dataclass(frozen=True)
class Line:
    """A step-time model to check by hand: constant, per prompt token, per row, per context token."""

    base_s: float = 0.002
    token_s: float = 1e-6
    row_s: float = 1e-5
    context_s: float = 1e-8

    def step_s(self, chunks: Any, decodes: int, context: int) -> float:
        base_s, per_token_s = self.decode_line(decodes)
        return base_s + context * per_token_s + sum(new for new, _ in chunks) * self.token_s

    def decode_line(self, decodes: int) -> tuple[float, float]:
        return self.base_s + decodes * self.row_s, self.context_s


LIMITS = SchedulerConfig(kv_blocks=4000, max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048)


def resolved(engine: str = "vllm") -> ResolvedConfig:
    return resolve(EngineConfig(engine=engine), catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb"))


def machine(engine: str = "vllm", limits: SchedulerConfig = LIMITS, make: Any = clock.Clock) -> Callable[[], Api]:
    return lambda: Api("tiny", make(limits, Line(), Page(resolved(engine), "tiny", limits)))


@dataclass
class Served:
    api: Api
    port: int

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def chat(self, content: str = "how are you", **fields: Any) -> dict[str, Any]:
        fields = {"messages": [{"role": "user", "content": content}], **fields}
        status, text = self.ask("POST", "/v1/chat/completions", {"model": "tiny", **fields})
        assert status == 200, text
        return json.loads(text)

    def events(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        status, text = self.ask("POST", path, {"stream": True, **fields})
        assert status == 200
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def metric(self, name: str) -> float:
        page = self.ask("GET", "/metrics")[1]
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


@contextmanager
def serving(make: Callable[[], Api]) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> tuple[Api, int]:
        api = make()
        server = await loop.create_server(partial(Connection, api), "127.0.0.1", 0)
        return api, server.sockets[0].getsockname()[1]

    async def end(api: Api) -> None:
        for connection in list(api.connections):
            connection.transport.abort()

    api, port = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    try:
        yield Served(api, port)
    finally:
        asyncio.run_coroutine_threadsafe(end(api), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(machine()) as server:
        yield server


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def eventually(condition: Any) -> bool:
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())


# --- the API -------------------------------------------------------------------------------------


def test_a_plain_answer_has_the_asked_length_and_usage(served: Served) -> None:
    answer = served.chat(max_tokens=7, ignore_eos=True)
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["content"]) == 7 * 4
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert answer["object"] == "chat.completion"
    assert answer["system_fingerprint"] == "emulated"


def test_an_answer_without_limits_ends_by_itself_and_min_tokens_holds(served: Served) -> None:
    assert served.chat()["choices"][0]["finish_reason"] == "stop"
    assert served.chat(min_tokens=300)["usage"]["completion_tokens"] == 300


def test_a_stream_has_one_event_per_token_and_usage_on_request(served: Served) -> None:
    fields = {"messages": [user("how are you")], "max_tokens": 5, "ignore_eos": True}
    events = served.events(**fields, stream_options={"include_usage": True})
    role, *tokens, usage = events
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert [e["choices"][0]["finish_reason"] for e in tokens] == [None] * 4 + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    whole = served.chat(max_tokens=5, ignore_eos=True)["choices"][0]["message"]["content"]
    assert "".join(e["choices"][0]["delta"]["content"] for e in tokens) == whole
    assert len(served.events(**fields)) == 6


def test_completions_take_text_and_token_ids(served: Served) -> None:
    events = served.events("/v1/completions", prompt="once upon a time", max_tokens=3)
    assert [bool(e["choices"][0]["text"]) for e in events] == [True] * 3
    status, text = served.ask("POST", "/v1/completions", {"prompt": list(range(50)), "max_tokens": 2})
    answer = json.loads(text)
    assert (status, answer["object"], answer["usage"]["prompt_tokens"]) == (200, "text_completion", 50)


def test_tokenize_agrees_with_usage(served: Served) -> None:
    for text in ("a", "four words of text", "déjà vu " * 40):
        told = json.loads(served.ask("POST", "/tokenize", {"messages": [user(text)]})[1])
        assert told["count"] == len(told["tokens"]) == served.chat(text, max_tokens=1)["usage"]["prompt_tokens"]


def test_a_second_turn_finds_the_first_one_cached(served: Served) -> None:
    first = served.chat("tell me of the second turn " * 40, max_tokens=64, ignore_eos=True)
    said = first["choices"][0]["message"]
    talk = [user("tell me of the second turn " * 40), said, user("and then?")]
    second = served.chat(messages=talk, max_tokens=1)["usage"]
    before = first["usage"]["total_tokens"]
    assert before - 16 <= second["prompt_tokens_details"]["cached_tokens"] <= before


def test_models_says_that_it_is_emulated(served: Served) -> None:
    card = json.loads(served.ask("GET", "/v1/models")[1])["data"][0]
    assert (card["id"], card["max_model_len"], card["emulated"]) == ("tiny", 8192, True)
    assert served.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"messages": [user("x" * 40_000)]}, 400, "8192"),
        ({"messages": [user("x")], "max_tokens": 9000}, 400, "9000"),
        ({"messages": [user("x")], "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [user("x")], "n": 2}, 400, "n:"),
        ({"messages": [user("x")], "model": "other"}, 404, "'other'"),
        ({"messages": 3}, 400, "int"),
        ({}, 400, "messages"),
        ([1], 400, "list"),
    ],
)
def test_bad_requests_get_an_openai_error(served: Served, body: Any, status: int, told: str) -> None:
    got, text = served.ask("POST", "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert (got, error["code"]) == (status, status)
    assert told in error["message"]


def test_a_wrong_path_and_what_is_no_http(served: Served) -> None:
    assert served.ask("GET", "/v2/nothing")[0] == 404
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


# --- tools and structured output -----------------------------------------------------------------

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 2}},
    "required": ["city", "days"],
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("weather", "clock")]


def test_tools_are_called_until_there_is_a_result(served: Served) -> None:
    choice = served.chat(tools=TOOLS)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "text", "days": 2}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    after = served.chat(messages=[user("how are you"), choice["message"], result], tools=TOOLS)
    assert "tool_calls" not in after["choices"][0]["message"]


def test_tool_choice_and_parallel_calls(served: Served) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    assert "tool_calls" not in served.chat(tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    (call,) = served.chat(tools=TOOLS, tool_choice=named)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    both = served.chat(tools=TOOLS, parallel_tool_calls=True)["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in both] == ["weather", "clock"]
    assert len({call["id"] for call in both}) == 2
    missing = {"messages": [user("x")], "tools": TOOLS, "tool_choice": {"function": {"name": "gone"}}}
    status, text = served.ask("POST", "/v1/chat/completions", missing)
    assert (status, "gone" in text) == (400, True)


def test_streamed_tool_calls_add_up(served: Served) -> None:
    events = served.events(messages=[user("now")], tools=TOOLS, parallel_tool_calls=True)
    arguments, names = {}, {}
    for event in events[1:]:
        for part in event["choices"][0]["delta"]["tool_calls"]:
            names.setdefault(part["index"], part["function"].get("name"))
            arguments[part["index"]] = arguments.get(part["index"], "") + part["function"]["arguments"]
    assert list(names.values()) == ["weather", "clock"]
    assert all(json.loads(text)["days"] == 2 for text in arguments.values())
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_structured_output_is_json_of_the_schema(served: Served) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    answer = served.chat(response_format=schema)["choices"][0]["message"]["content"]
    assert json.loads(answer) == {"city": "text", "days": 2}
    anything = served.chat(response_format={"type": "json_object"})["choices"][0]["message"]["content"]
    assert isinstance(json.loads(anything), dict)
    cut = served.chat(response_format=schema, max_tokens=2)["choices"][0]
    assert (cut["finish_reason"], cut["message"]["content"]) == ("length", answer[:8])


SCHEMAS = [
    {"type": "string", "minLength": 6, "maxLength": 9},
    {"type": "integer", "exclusiveMinimum": 4, "maximum": 5},
    {"type": "integer", "maximum": -3},
    {"type": "integer", "minimum": 7, "multipleOf": 5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 4}], "items": False, "minItems": 2},
    {"type": ["null", "string"]},
    {"enum": ["b", 3]},
    {"anyOf": [{"type": "null"}, {"type": "object", "required": ["a"], "properties": {"a": {"type": "number"}}}]},
    {"allOf": [{"required": ["a"], "properties": {"a": {"type": "string"}}}, {"properties": {"b": {"const": 1}}}]},
    {"$ref": "#/$defs/node", "$defs": {"node": {
        "type": "object", "required": ["name"],
        "properties": {"name": {"type": "string", "format": "date"},
                       "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                       "all": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}}},
    True,
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_the_generated_value_is_valid(schema: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    value = json.loads(json.dumps(example(schema)))
    jsonschema.Draft202012Validator(schema).validate(value)


# --- overload, disconnects, metrics --------------------------------------------------------------


def raw_stream(port: int, body: dict[str, Any]) -> socket.socket:
    data = json.dumps({"stream": True, "ignore_eos": True, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
    return connection


def test_a_full_queue_answers_503() -> None:
    limits = replace(LIMITS, max_num_seqs=1, max_num_queued_reqs=2)  # running and waiting
    with serving(machine(limits=limits)) as served:
        slow = {"messages": [user("x")], "max_tokens": 8000}
        first = raw_stream(served.port, slow)
        assert eventually(lambda: served.metric("vllm:num_requests_running") == 1)
        second = raw_stream(served.port, slow)
        assert eventually(lambda: served.metric("vllm:num_requests_waiting") == 1)
        status, text = served.ask("POST", "/v1/chat/completions", slow)
        assert (status, json.loads(text)["error"]["code"]) == (503, 503)
        assert served.metric("vllm:admission_rejections_total") == 1
        first.close()
        second.close()


def test_a_client_that_leaves_frees_its_blocks() -> None:
    with serving(machine()) as served:
        clients = [raw_stream(served.port, {"messages": [user(f"{i} " * 200)], "max_tokens": 7000}) for i in range(3)]
        assert eventually(lambda: served.metric("vllm:kv_cache_usage_perc") > 0 and clients[0].recv(10))
        for client in clients:
            client.close()
        assert eventually(lambda: served.metric("vllm:num_requests_running") == 0)
        assert served.metric("vllm:kv_cache_usage_perc") == 0
        assert 'finished_reason="abort",engine="0",model_name="tiny"} 3' in served.ask("GET", "/metrics")[1]
        assert served.chat(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_counters_add_up() -> None:
    with serving(machine()) as served:
        answers = [served.chat(f"question {i}", max_tokens=9, ignore_eos=True) for i in range(4)]
        assert served.metric("vllm:generation_tokens_total") == 36
        prompts = sum(answer["usage"]["prompt_tokens"] for answer in answers)
        assert served.metric("vllm:prompt_tokens_total") == served.metric("vllm:prefix_cache_queries_total") == prompts
        assert served.metric("vllm:time_to_first_token_seconds_count") == 4
        assert served.metric("vllm:inter_token_latency_seconds_count") == 32
        assert served.metric("vllm:request_success_total") == 4
        assert served.metric("emulator_clock_lateness_seconds_count") >= 36


@pytest.mark.parametrize(
    ("engine", "file"),
    [("vllm", "vllm_cpu/metrics_vllm_0.32.0.txt"), ("sglang", "sglang_cpu/metrics_sglang_0.5.23.txt")],
)
def test_names_labels_and_edges_are_the_engines(engine: str, file: str) -> None:
    captured = SHARED / "engines" / file
    if not captured.exists():
        pytest.skip(f"{captured} is not there")
    real = captured.read_text()
    page = Page(resolved(engine), "tiny", LIMITS).text(defaultdict(lambda: 64.0))
    absent_at_first = {"sglang:num_retracted_requests_total", "sglang:num_aborted_requests_total"}
    for line in page.splitlines():
        found = re.match(r"(\w+:\w+)\{(.*)\}", line)
        if not found or found[1] in absent_at_first:
            continue
        name, labels = found[1], set(re.findall(r'(\w+)="', found[2]))
        twins = re.findall(rf"^{name}\{{(.*)\}}", real, re.MULTILINE)
        assert twins, f"{engine} prints no {name}"
        assert labels <= set(re.findall(r'(\w+)="', "".join(twins))), name
        if edge := re.search(r'le="(.*?)"', found[2]):
            assert any(f'le="{edge[1]}"' in twin for twin in twins), f"{name} has no edge {edge[1]}"


def test_the_page_reads_back_in_our_words() -> None:
    telemetry = pytest.importorskip("kit.telemetry")
    for engine in ("vllm", "sglang"):
        with serving(machine(engine)) as served:
            served.chat(max_tokens=4)
            read = telemetry.read_page(served.ask("GET", "/metrics")[1])
            assert (read.engine, read.running, read.generation_tokens) == (engine, 0, 4)
            assert read.kv_cache_tokens == LIMITS.kv_blocks * LIMITS.block_size


def test_nothing_is_left_to_the_garbage_collector() -> None:
    def left() -> int:
        return sum(isinstance(one, Generation | Request | Connection) for one in gc.get_objects())

    with serving(machine()) as served:
        gc.collect()
        gc.disable()
        before = left()
        for i in range(5):
            served.chat(f"question {i}", max_tokens=3)
            served.events(messages=[user("x")], max_tokens=3)
            served.events(messages=[user("x")], tools=TOOLS)
            served.ask("POST", "/v1/chat/completions", {})
            client = raw_stream(served.port, {"messages": [user("x")], "max_tokens": 7000})
            client.recv(10)
            client.close()
        try:
            assert eventually(lambda: served.metric("vllm:num_requests_running") == 0)
            assert eventually(lambda: left() <= before + 1)
        finally:
            gc.enable()


def test_the_same_requests_get_the_same_answers() -> None:
    said = []
    for _ in range(2):
        with serving(machine()) as served:
            said.append([served.chat(f"question {i}", tools=TOOLS[:i])["choices"] for i in range(2)])
    assert said[0] == said[1]


# --- pace, hidden machine, schedule --------------------------------------------------------------


def test_pace_is_kept() -> None:
    with serving(machine(make=partial(clock.Paced, (0.1, 0.01)))) as served:
        begun = time.monotonic()
        answer = served.events(messages=[user("x")], max_tokens=21, ignore_eos=True)
        assert 0.3 <= time.monotonic() - begun < 3.0  # 0.1 + 20 x 0.01 s; the rest is this machine's
        assert len(answer) == 22


def test_a_hidden_machine_is_the_seeds_and_slower_where_its_factors_say() -> None:
    nominal = Line()
    limits, steps = hide(3, LIMITS, nominal)
    drawn = steps.truth
    assert drawn == hide(3, LIMITS, nominal)[1].truth != hide(4, LIMITS, nominal)[1].truth
    assert limits.kv_blocks == int(LIMITS.kv_blocks * drawn.kv_cache_factor)
    base_s, per_token_s = steps.decode_line(8)
    assert base_s == pytest.approx(nominal.decode_line(8)[0] / drawn.bandwidth_factor + drawn.step_s + 8 * drawn.row_s)
    assert steps.step_s([], 8, 1000) == pytest.approx(base_s + 1000 * per_token_s)
    more_s = steps.step_s([(500, 0)], 8, 1000) - steps.step_s([], 8, 1000)
    assert more_s == pytest.approx(500 * nominal.token_s / drawn.compute_factor + drawn.request_s)


class VirtualLoop:
    """call_soon and call_later on a clock that jumps; a poll costs 20 us."""

    def __init__(self) -> None:
        self.now, self.heap, self.order = 1000.0, list[Any](), count()

    def monotonic(self) -> float:
        return self.now

    def call_later(self, delay_s: float, do: Any, *given: Any) -> Any:
        handle = asyncio.Handle(do, given, self)  # type: ignore[arg-type]
        heappush(self.heap, (self.now + delay_s, next(self.order), handle))
        return handle

    def call_soon(self, do: Any) -> Any:
        return self.call_later(2e-5, do)

    def get_debug(self) -> bool:
        return False

    def run(self, until: Callable[[], int] = lambda: False) -> None:
        while self.heap and not until():
            due, _, handle = heappop(self.heap)
            self.now = max(self.now, due)
            if not handle.cancelled():
                handle._run()


class Talk:
    """A session that sends its turns to a Clock, each after the answer before and its pause."""

    def __init__(self, session: Session, clock: clock.Clock, tree: PrefixTree, loop: VirtualLoop) -> None:
        self.session, self.clock, self.tree, self.loop = session, clock, tree, loop
        self.text, self.turn, self.requests = b"", 0, list[Request]()

    def send(self) -> None:
        turn = self.session.turns[self.turn]
        name = f"{self.session.key:04d}{self.turn:04d}".encode()
        self.text += name * (turn.new_tokens // 2)
        answer = words(turn.output_len, self.session.key).encode()
        path = self.tree.path(self.text + answer)
        request = Request(1000 * self.session.key + self.turn, len(self.text) // 4, turn.output_len, path, self)
        self.text += answer
        self.requests.append(request)
        assert self.clock.submit(request, clock.monotonic()) is None

    def token(self, last: bool) -> None:
        if last:
            self.turn += 1
            if self.turn < len(self.session.turns):
                self.loop.call_later(self.session.turns[self.turn - 1].pause_after_s, self.send)


def sessions(seed: int, number: int) -> list[Session]:
    rng = np.random.default_rng(seed)
    drawn = []
    for key in range(number):
        turns = [
            Turn(2 * int(rng.integers(20, 400)), int(rng.integers(5, 120)), float(rng.random() / 5)) for _ in range(3)
        ]
        drawn.append(Session(key, float(rng.random() * 0.2), turns))
    return sorted(drawn, key=lambda session: session.arrival_s)


@dataclass(frozen=True)
class SlowApi(Line):
    """The same, behind an API and a tokeniser."""

    def request_s(self, input_len: int, streams: int) -> float:
        return 0.005 + 1e-6 * input_len + 1e-4 * streams


@pytest.mark.parametrize(
    ("kv_blocks", "mixed_steps", "steps"),
    [(2000, True, Line()), (800, True, Line()), (2000, False, Line()), (2000, True, SlowApi())],
)
def test_it_schedules_as_the_simulator_does(
    kv_blocks: int, mixed_steps: bool, steps: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, kv_blocks=kv_blocks, max_num_seqs=24, max_num_batched_tokens=512, mixed_steps=mixed_steps)
    load = sessions(1, 40)
    simulated = Simulation(SimulationConfig(limits, request_s=getattr(steps, "request_s", None)), steps).run(load)
    loop = VirtualLoop()
    monkeypatch.setattr(clock, "monotonic", loop.monotonic)
    page = Page(resolved(), "tiny", limits)
    real = clock.Clock(limits, steps, page, loop)
    tree = PrefixTree(limits.block_size)
    talks = [Talk(session, real, tree, loop) for session in load]
    for talk in talks:
        loop.call_later(talk.session.arrival_s, talk.send)
    loop.run()
    theirs = simulated.replicas[0].scheduler
    assert real.scheduler.preemptions == theirs.preemptions
    assert real.scheduler.hit_tokens == theirs.hit_tokens > 0
    assert (theirs.preemptions > 0) == (kv_blocks == 800)
    assert loop.now - 1000 == pytest.approx(simulated.now / TICKS_PER_S, rel=0.01)
    turns = np.frombuffer(simulated.turns).reshape(-1, 15)
    ttft_s = np.median([request.times[2] - request.times[0] for talk in talks for request in talk.requests])
    assert ttft_s == pytest.approx(np.median(turns[:, 7] - turns[:, 5]), rel=0.03)
    spent = [request.times for talk in talks for request in talk.requests]
    outside_the_queue_s = min(first - arrival - waited for arrival, waited, first, _ in spent)
    assert outside_the_queue_s >= (0.0052 if isinstance(steps, SlowApi) else 0.0)
    asked, told = page.histograms["e2el"], page.histograms["queue_time"]
    assert sum(told.counts) == sum(asked.counts) == len(spent)
    assert told.sum == pytest.approx(sum(waited for _, waited, *_ in spent))
    assert min(waited for _, waited, *_ in spent) >= -1e-9


def test_the_queue_time_is_told_when_the_engine_tells_it() -> None:
    """vLLM at a request's end, so that its share of the latency is one; SGLang at the first forward pass."""
    told = {}
    for engine in ("vllm", "sglang"):
        loop = VirtualLoop()
        page = Page(resolved(engine), "tiny", LIMITS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clock, "monotonic", loop.monotonic)
            real = clock.Clock(LIMITS, Line(), page, loop)
            talk = Talk(sessions(1, 1)[0], real, PrefixTree(LIMITS.block_size), loop)
            talk.send()
            loop.run(until=lambda page=page: sum(page.histograms["ttft"].counts))
        told[engine] = sum(page.histograms["queue_time"].counts)
    assert told == {"vllm": 0, "sglang": 1}


def test_a_request_counts_from_its_arrival_however_long_those_before_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, seen, body = VirtualLoop(), list[Any](), bytearray(b'{"max_tokens": 1, "messages": []}')
    monkeypatch.setattr(clock, "monotonic", loop.monotonic)
    monkeypatch.setattr(server, "monotonic", loop.monotonic)
    api = Api("tiny", clock.Clock(LIMITS, Line(), Page(resolved(), "tiny", LIMITS), loop))

    def slow(connection: Any, body: Any, arrival: float) -> None:
        seen.append((connection, arrival, loop.now))
        loop.now += 0.004

    api.routes["POST /v1/chat/completions"] = slow
    clients: list[Any] = [SimpleNamespace(key=key, asked=False) for key in range(4)]
    monkeypatch.setattr(api, "connections", clients[:3])  # the last one has left
    for client in clients:
        api.arrived(client, "POST /v1/chat/completions", body)
    loop.run()
    assert [one[0] for one in seen] == clients[:3]
    assert {arrival for _, arrival, _ in seen} == {1000.0}
    assert seen[-1][2] > 1000.008
    assert not any(client.asked for client in clients)


def test_who_leaves_before_the_api_is_done_is_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = VirtualLoop()
    monkeypatch.setattr(clock, "monotonic", loop.monotonic)
    real = clock.Clock(LIMITS, SlowApi(), Page(resolved(), "tiny", LIMITS), loop)
    calls = [Request(key, 100, 5, owner=SimpleNamespace(token=bool)) for key in range(2)]
    assert [real.submit(call, loop.now) for call in calls] == [None, None]
    assert real.values()["waiting"] == 2
    real.cancel(calls[0])
    loop.run()
    assert [real.counts[name] for name in ("abort", "generation_tokens")] == [1, 5]


def test_a_hidden_machine_stalls_now_and_then() -> None:
    _, steps = hide(1, LIMITS, Line())
    base_s, per_token_s = steps.decode_line(8)
    step_s = base_s + 1000 * per_token_s
    steps.truth.stall_every_s, steps.truth.stall_s = 100 * step_s, 10.0
    stalls = [round((steps.step_s([], 8, 1000) - step_s) / 10.0) for _ in range(20_000)]
    assert set(stalls) == {0, 1}
    assert 140 <= sum(stalls) <= 260  # 200 expected
    again = hide(1, LIMITS, Line())[1]
    again.truth = steps.truth
    assert [again.step_s([], 8, 1000) > 10.0 for _ in range(500)] == [stall > 0 for stall in stalls[:500]]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_serves_and_stops(tmp_path: Path) -> None:
    given = ["emulate", "--model", "llama-3.1-8b", "--gpu", "l4-24gb", "--quantization", "fp8", "--port", "0", "--json"]
    process = subprocess.Popen([*KIT, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    told = json.loads(process.stdout.readline())
    try:
        port = int(told["base_url"].rpartition(":")[2])
        other = subprocess.run([*KIT, *given[:-2], str(port)], capture_output=True, text=True, check=False)
        assert (other.returncode, str(port) in other.stderr, "Traceback" in other.stderr) == (2, True, False)
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert "ready" in err
    assert told["emulated"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--pace", "fast"], "'fast'"),
        (["--pace", "100,0"], "'100,0'"),
        (["--port", "70000"], "70000"),
        (["--host", "nowhere.invalid"], "nowhere.invalid"),
        (["--gpu", "h1000"], "h100"),
        (["--max-num-seqs", "0"], "0"),
        (["--truth", "-1"], "-1"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kit import cli

    base = {"--model": "llama-3.1-8b", "--gpu": "h100-sxm-80gb", "--port": "0", given[0]: given[1]}
    arguments = ["kit", "emulate", *(part for pair in base.items() for part in pair)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in told
    assert len(told.splitlines()) <= 3


def test_a_failed_clock_ends_the_server():
    def broken() -> Any:
        asyncio.get_running_loop().call_later(0.01, lambda: 1 / 0)
        return SimpleNamespace(connection=Connection, connections=set())

    with pytest.raises(RuntimeError, match="clock failed"):
        asyncio.run(asyncio.wait_for(listen(broken, "127.0.0.1", 0, lambda url: None), 20))
    gc.enable()
