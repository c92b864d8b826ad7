"""docs/glossary.md: one stream under five definitions, and the table there is what this computes."""

import json
from pathlib import Path

import numpy as np
from sse_server import HEAD, chunk, event, usage

from kit.loadgen.stream import StreamParser
from kit.metrics import Requests, token_gaps

GLOSSARY = Path(__file__).parents[1] / "docs" / "glossary.md"
# Seconds after the send, field, text, tokens in it. The usage arrives with [DONE] at END_S.
CHUNKS = (
    (0.10, "content", "", 0),  # with the role
    (0.30, "reasoning_content", "Let", 1),
    (0.50, "reasoning_content", " me see", 2),
    (0.80, "content", "It is", 2),
    (1.00, "content", " 4", 1),
)
END_S = 1.30
N = sum(tokens for *_, tokens in CHUNKS)
Row = tuple[float, list[float], float, float]


def _times(*fields: str) -> np.ndarray:
    return np.array([at for at, field, text, _ in CHUNKS if text and field in fields])


def kit() -> Row:
    """The parser and the metrics of this kit, fed the stream with a running usage."""
    parser, told = StreamParser(), 0
    parser.feed(HEAD, 0.0)
    for at, field, text, tokens in CHUNKS:
        told += tokens
        delta = {"role": "assistant", field: text} if not text else {field: text}
        running = {"prompt_tokens": 9, "completion_tokens": told}
        data = {"choices": [{"index": 0, "delta": delta}], "usage": running}
        parser.feed(chunk(event(data)), at)
    end = chunk(event(usage(9, N))) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    parser.feed(end, END_S)
    assert parser.outcome() is None
    times, tokens = np.array(parser.times), np.array(parser.chunk_tokens)
    columns = (0.0, 0.0, times[0], times[-1], END_S, parser.output_tokens())
    one = Requests(*(np.array([value], float) for value in columns), ok=np.array([True]))
    one.first_chunk_tokens = tokens[:1]
    gaps = token_gaps(times, tokens).tolist()
    return float(one.ttft_s()[0]), gaps, float(one.tpot_s()[0]), float(one.e2el_s()[0])


def vllm() -> Row:
    """vllm bench serve 0.33: reasoning_content is no token to it; gaps per chunk."""
    times = _times("content", "reasoning")
    return times[0], np.diff(times).tolist(), (times[-1] - times[0]) / (N - 1), times[-1]


def sglang() -> Row:
    """sglang.bench_serving 0.5.23: the end is the last line read, usage and [DONE] included."""
    times = _times("content", "reasoning_content")
    return times[0], np.diff(times).tolist(), (END_S - times[0]) / (N - 1), END_S


def guidellm() -> Row:
    """guidellm 0.8.1: one ITL per request; time per output token includes the first."""
    times = _times("content", "reasoning_content", "reasoning")
    return times[0], [(times[-1] - times[0]) / (N - 1)], times[-1] / N, END_S


def aiperf() -> Row:
    """aiperf 0.13: one ITL per request, without the tokens of the first chunk; no TPOT apart."""
    times = _times("content", "reasoning_content", "reasoning")
    itl = (times[-1] - times[0]) / (N - CHUNKS[1][3])
    return times[0], [itl], itl, times[-1]


def table() -> str:
    lines = ["| | TTFT | ITL | TPOT | E2EL |", "|---|---|---|---|---|"]
    names = {"kit": kit, "vllm bench serve 0.33": vllm, "sglang.bench_serving 0.5.23": sglang}
    names |= {"guidellm 0.8.1": guidellm, "aiperf 0.13": aiperf}
    for name, measure in names.items():
        ttft, itl, tpot, e2el = measure()
        gaps = ", ".join(f"{gap * 1e3:.0f}" for gap in itl)
        lines.append(f"| {name} | {ttft * 1e3:.0f} | {gaps} | {tpot * 1e3:.0f} | {e2el * 1e3:.0f} |")
    return "\n".join(lines)


def test_the_table_is_computed() -> None:
    assert table() in GLOSSARY.read_text(encoding="utf-8"), table()


def test_the_stream_is_the_one_shown() -> None:
    page = GLOSSARY.read_text(encoding="utf-8")
    for at, field, text, tokens in CHUNKS:
        assert f"| {at:.2f} | `{field}` {json.dumps(text)} | {tokens} |" in page


def test_no_two_tools_agree_on_all_four() -> None:
    rows = [str(measure()) for measure in (kit, vllm, sglang, guidellm, aiperf)]
    assert len(set(rows)) == 5
