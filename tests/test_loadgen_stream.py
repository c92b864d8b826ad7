"""Ten recorded streams give their documented numbers, however they are split."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sse_server import HEAD, chunk, event, token, usage

from kit.loadgen.stream import StreamParser
from kit.metrics import Requests, token_gaps

STREAMS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "data/streams.yaml").read_text())


def pieces(stream: dict[str, Any]) -> list[tuple[float, bytes]]:
    """What arrives when: the head at 0, each chunk at its time, the end with the last one."""
    body = [(at, chunk(text.replace("\\n", "\n").encode())) for at, text in stream["chunks"]]
    end = [] if stream.get("cut") else [(body[-1][0], b"0\r\n\r\n")]
    return [(0.0, HEAD), *body, *end]


def parse(fed: list[tuple[float, bytes]]) -> StreamParser:
    parser = StreamParser(keep_text=True)
    for at, data in fed:
        parser.feed(data, at)
    parser.close()
    return parser


def numbers(parser: StreamParser) -> dict[str, Any]:
    """The request's metrics, sent at 0."""
    times, tokens = np.array(parser.times), parser.output_tokens()
    told = np.array(parser.chunk_tokens)
    first, last = (times[0], times[-1]) if len(times) else (np.nan, np.nan)
    columns = (0.0, 0.0, first, last, last, tokens)
    one = Requests(*(np.array([c], float) for c in columns), ok=np.array([True]))
    if len(told) and told.all():
        one.first_chunk_tokens = told[:1]
    tpot = one.tpot_s()[0]
    return {
        "outcome": parser.outcome(),
        "ttft_s": one.ttft_s()[0],
        "ttft_answer_s": parser.first_answer_s,
        "output_tokens": tokens,
        "tpot_s": None if np.isnan(tpot) else tpot,
        "e2el_s": one.e2el_s()[0],
        "itl_s": token_gaps(times, told if told.all() else None, tokens).tolist(),
    }


def assert_documented(name: str, parser: StreamParser) -> None:
    got = numbers(parser)
    for key, value in STREAMS[name]["expect"].items():
        exact = value is None or isinstance(value, str)
        assert got[key] == (value if exact else pytest.approx(value)), (name, key)


def test_there_are_ten() -> None:
    assert len(STREAMS) == 10


@pytest.mark.parametrize("name", STREAMS)
def test_recorded_stream(name: str) -> None:
    assert_documented(name, parse(pieces(STREAMS[name])))


@pytest.mark.parametrize("name", STREAMS)
def test_split_at_every_byte(name: str) -> None:
    """Two reads that meet anywhere; the second half of a piece arrives at the piece's time."""
    whole = pieces(STREAMS[name])
    for index, (at, data) in enumerate(whole):
        before = whole[index - 1][0] if index else 0.0
        for cut in range(1, len(data)):
            halves = [(before, data[:cut]), (at, data[cut:])]
            # A token may only be seen early if the whole event lies before the cut.
            if b"\n\n" in data[:cut] or b"\r\n\r" in data[:cut]:
                halves[0] = (at, data[:cut])
            assert_documented(name, parse([*whole[:index], *halves, *whole[index + 1 :]]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_any_split_gives_the_same_answer(name: str, data: st.DataObject) -> None:
    raw = b"".join(part for _, part in pieces(STREAMS[name]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    edges = [0, *cuts, len(raw)]
    split = parse([(0.0, raw[a:b]) for a, b in pairwise(edges)])
    whole = parse([(0.0, raw)])
    for key in ("status", "complete", "done", "usage", "text", "finish_reason"):
        assert getattr(split, key) == getattr(whole, key)
    assert (split.outcome(), len(split.times)) == (whole.outcome(), len(whole.times))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_garbage_never_raises(parts: list[bytes]) -> None:
    parser = parse([(0.0, part) for part in parts])
    assert parser.outcome() is not None
    body = [(0.0, HEAD), *((0.1, chunk(b"data: " + part)) for part in parts if part)]
    assert parse(body).outcome() is not None


@pytest.mark.parametrize("text", ["plain", 'quote " inside', "back\\slash", "\\", "new\nline", "ünïcödé", '"', "{}"])
def test_text_of_like_events_is_kept_exactly(text: str) -> None:
    """The shortcut for events that differ in one string gives what JSON gives."""
    texts = ["first", text, "third", text + text]
    body = [(0.1 * k, chunk(event(token(word)))) for k, word in enumerate(texts)]
    tail = [(1.0, chunk(event(usage(3, 4))) + chunk(event(b"[DONE]")) + b"0\r\n\r\n")]
    parser = parse([(0.0, HEAD), *body, *tail])
    assert parser.outcome() is None
    assert parser.text == texts
    assert len(parser.times) == 4


def test_a_shortcut_does_not_hide_an_error() -> None:
    body = [chunk(event(token("a"))), chunk(event(token("b"))), chunk(event({"error": "x"}))]
    assert parse([(0.0, HEAD), *((0.0, part) for part in body)]).outcome() == "error_in_stream"


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}", "http_429"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not_a_stream"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "garbage"),
        (b"", "closed"),
        (HEAD + b"0\r\n\r\n", "cut"),
        (HEAD + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n", "no_token"),
        (HEAD + chunk(b"data: {oops}\n\n"), "garbage"),
        (HEAD + chunk(b"data: [1]\n\n"), "garbage"),
    ],
)
def test_reasons_of_failures(head: bytes, outcome: str) -> None:
    assert parse([(0.0, head)] if head else []).outcome() == outcome


def test_a_body_that_ends_with_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    good = head + event(token("a")) + b"data: [DONE]\n"
    assert parse([(0.0, good)]).outcome() is None
    assert parse([(0.0, head + event(token("a")) + b'data: {"cho')]).outcome() == "cut"
