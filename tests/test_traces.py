"""Readers of recorded workloads, their bad lines, and figures of the real files where present."""

import json
import os
from pathlib import Path

import pytest

from kit.errors import UserError
from kit.scheduler import lru_hit_fraction
from kit.traces import MOONCAKE_BLOCK_TOKENS, Trace, read

TRACES = Path(os.environ.get("KIT_SHARED", Path(__file__).parents[2] / "shared")) / "traces"

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
WEKA = "trace,agent,t_s,in_tokens,out_tokens,seen_blocks_prefix,api_time_s,think_time_s\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"


def recorded(*parts: str) -> Path:
    path = TRACES.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"no trace at {path}")
    return path


def line(timestamp: int, tokens: int, ids: list[int], output: int = 5) -> str:
    fields = {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": ids}
    return json.dumps(fields) + "\n"


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "trace.txt"
    file.write_text(text)
    return str(file)


def test_azure(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:05.5000000,7,3\n2023-11-16 18:17:03.0000000,10,2\n"
    trace = read(written(tmp_path, text), "azure")
    assert [(c.arrival_s, c.input_len, c.output_len) for c in trace.calls] == [(0, 10, 2), (2.5, 7, 3)]


def test_mooncake_merges_hash_blocks_that_occur_together(tmp_path: Path) -> None:
    text = line(0, 1500, [1, 2, 3]) + line(1000, 1024, [1, 9]) + line(2000, 1500, [1, 2, 3])
    trace = read(written(tmp_path, text), "mooncake")
    first, second, third = (call.path for call in trace.calls)
    assert [end for _, end in first] == [512, 1500]
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert third == first
    assert [s.turns[0].new_tokens for s in trace.sessions()] == [1500, 1024, 1500]


def test_weka_sessions_keep_lengths_pauses_and_subagents(tmp_path: Path) -> None:
    rows = ["a,0,0.0,1000,50,0,5.0,0.0", "a,0,20.0,1200,60,15,5.0,15.0", "a,0/1,6.0,300,9,0,1.0,0.0",
            "a,0,90.0,400,10,2,5.0,60.0"]  # fmt: skip
    trace = read(written(tmp_path, WEKA + "\n".join(rows) + "\n"), "weka")
    (session,) = trace.sessions(iter([7.0]))
    assert session.arrival_s == 7.0
    assert session.input_lens() == [1000, 1200, 400]  # the third has shrunk: a new context
    assert session.turns[2].compact_to == 0
    assert [turn.pause_after_s for turn in session.turns] == [15.0, 60.0, 0.0]
    assert [child.turns[0].new_tokens for child in session.turns[0].children] == [300]


def test_burstgpt_leaves_failures_out_and_finds_pauses(tmp_path: Path) -> None:
    header = BURSTGPT + ",Session ID,Elapsed time\n"
    rows = ["10,m,100,20,120,Conversation log,s1,4", "11,m,50,0,50,API log,,0",
            "30,m,150,20,170,Conversation log,s1,2"]  # fmt: skip
    trace = read(written(tmp_path, header + "\n".join(rows) + "\n"), "burstgpt")
    assert trace.skipped == 1
    (session,) = trace.sessions()
    assert session.input_lens() == [100, 150]
    assert session.turns[0].pause_after_s == 16.0


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("azure", AZURE + "2023-11-16 18:17:03.0,10,2\n2023-11-16 18:17:04.0,ten,2\n", "line 3.*ten"),
        ("azure", AZURE + "2023-11-16 18:17:03.0,10\n", "line 2"),
        ("azure", AZURE + "yesterday,10,2\n", "line 2.*yesterday"),
        ("azure", AZURE + "2023-11-16 18:17:03.0,10,-2\n", "line 2.*negative"),
        ("azure", "a,b\n1,2\n", "line 1: no column 'TIMESTAMP'"),
        ("azure", AZURE, "no requests"),
        ("azure", "", "no requests"),
        ("mooncake", line(0, 600, [1, 2]) + '{"timestamp": 0,\n', "line 2"),
        ("mooncake", line(0, 600, [1]), "line 1: 1 hash_ids do not cover 600"),
        ("mooncake", "[1]\n", "line 1"),
        ("mooncake", "", "no requests"),
        ("mooncake", '{"timestamp": null, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "line 1"),
        ("mooncake", '{"timestamp": 0, "input_length": "x", "output_length": 1, "hash_ids": [1]}', "line 1.*'x'"),
        ("mooncake", "\xff\x00", "line 1"),
        ("weka", WEKA + "a,0,0,100,5,0,1,0\na,0,5,x,5,0,1,0\n", "line 3"),
        ("burstgpt", BURSTGPT + "\n5,m,x,1,1,API\n", "line 2"),
        ("burstgpt", BURSTGPT + "\n5,m,0,1,1,API\n", "line 2"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, form: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"trace.txt.*{message}"):
        read(written(tmp_path, text), form)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary.csv"
    file.write_bytes(b"\xff\xfe\x00\x01")
    for form in ("azure", "mooncake"):
        with pytest.raises(UserError, match=r"binary.csv: not a text file"):
            read(str(file), form)


def test_unknown_format_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown trace format 'moon'"):
        read("x", "moon")
    with pytest.raises(UserError, match="no such trace file"):
        read(str(tmp_path / "none.csv"), "azure")


@pytest.mark.parametrize(
    ("capacity_tokens", "hits"),
    [(500_000, 0.045), (2_000_000, 0.087), (8_200_000, 0.268), (33_000_000, 0.366)],
)
def test_mooncake_lru_hits(capacity_tokens: int, hits: float) -> None:
    trace = read(str(recorded("mooncake", "conversation_trace.jsonl")), "mooncake")
    # in hash blocks, partial last ones included
    paths = [tuple((one, -(-end // MOONCAKE_BLOCK_TOKENS)) for one, end in call.path) for call in trace.calls]
    found = lru_hit_fraction(paths, capacity_tokens // MOONCAKE_BLOCK_TOKENS)
    assert found == pytest.approx(hits, abs=0.01)


def kept_hit_fraction(trace: Trace, keep_s: float) -> float:
    """Fraction of prompt tokens still cached if a session's KV is kept `keep_s` after each call."""
    calls = [call for call in trace.calls if not call.parent]
    kept = sum(c.reusable_tokens for c in calls if c.pause_s is not None and c.pause_s <= keep_s)
    return kept / sum(call.input_len for call in calls)


def test_weka_hits_by_time_kept() -> None:
    trace = read(str(recorded("weka_cc", "claude_code_calls.csv")), "weka")
    for keep_s, hits in ((10, 0.45), (60, 0.77), (300, 0.90), (3600, 0.96)):
        assert kept_hit_fraction(trace, keep_s) == pytest.approx(hits, abs=0.01)


def test_weka_sessions_send_what_was_recorded() -> None:
    trace = read(str(recorded("weka_cc", "claude_code_calls.csv")), "weka")
    sessions = list(trace.sessions())
    sent = sum(sum(session.input_lens()) for session in sessions)
    asked = sum(call.input_len for call in trace.calls if not call.parent)
    assert sent == pytest.approx(asked, rel=0.002)
    children = sum(len(turn.children) for session in sessions for turn in session.turns)
    assert children == 63
