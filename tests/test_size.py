"""kit size as a user calls it: JSON keys, tables, a pasted log, and one line for every mistake."""

import json
import sys
from pathlib import Path

import pytest

from kit.cli import main

KEYS = {
    "weights_bytes_per_gpu",
    "activation_bytes_per_gpu",
    "non_torch_bytes_per_gpu",
    "cuda_graph_bytes_per_gpu",
    "kv_cache_bytes_per_gpu",
    "kv_cache_bytes_interval",
    "kv_bytes_per_token",
    "kv_cache_tokens",
    "kv_cache_tokens_interval",
    "max_concurrent_sessions",
    "required_bytes",
    "fits",
    "engine_args",
    "warnings",
}

# Written for this test in the wording of vLLM 0.19; the numbers are those of no machine.
VLLM_LOG = """\
INFO [api_server.py:1] vLLM API server version 0.19.0
INFO [utils.py:1] non-default args: {'model': 'Qwen/Qwen3-8B', 'max_num_seqs': 256, \
'gpu_memory_utilization': 0.9}
INFO [gpu_model_runner.py:1] Model loading took 15.27 GiB memory and 9.1 seconds
INFO [gpu_worker.py:1] Memory profiling takes 3.3 seconds. Total non KV cache memory: 16.33GiB; \
torch peak memory increase: 2.21GiB; non-torch forward increase memory: 0.25GiB; \
weights memory: 15.27GiB.
INFO [gpu_worker.py:1] Available KV cache memory: 53.54 GiB
INFO [kv_cache_utils.py:1] GPU KV cache size: 389,856 tokens
INFO [kv_cache_utils.py:1] Maximum concurrency for 40,960 tokens per request: 9.52x
"""
SGLANG_LOG = """\
[2026-01-01] server_args=ServerArgs(model_path='Qwen/Qwen3-8B', mem_fraction_static=0.84, tp_size=1)
[2026-01-01] Load weight begin. avail mem=78.50 GB
[2026-01-01] Load weight end. type=Qwen3ForCausalLM, avail mem=63.20 GB, mem usage=15.30 GB.
[2026-01-01] KV Cache is allocated. #tokens: 367000, K size: 25.20 GB, V size: 25.20 GB
"""


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call."""
    monkeypatch.setattr(sys, "argv", ["kit", "size", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


BASE = ("--model", "qwen3-8b", "--gpu", "h100-sxm-80gb")


def test_json_is_one_object_with_the_keys(capsys, monkeypatch) -> None:
    code, out, err = run(capsys, monkeypatch, *BASE, "--context-tokens", "8192", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert set(record) >= KEYS
    low, high = record["kv_cache_tokens_interval"]
    assert low <= record["kv_cache_tokens"] <= high
    assert record["fits"] is True
    assert record["engine_args"]["--gpu-memory-utilization"] == "0.92"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "tgi", "ollama"])
def test_every_engine_answers(capsys, monkeypatch, engine: str) -> None:
    _, out, _ = run(capsys, monkeypatch, *BASE, "--engine", engine, "--json")
    record = json.loads(out)
    assert 100_000 < record["kv_cache_tokens"] < 600_000
    assert all(flag.startswith("-") for flag in record["engine_args"])
    guessed = any("a guess" in warning for warning in record["warnings"])
    assert guessed == (engine not in ("vllm", "sglang"))


def test_table_has_the_answer_first(capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, *BASE, "--sessions", "3", "--context-tokens", "4096")
    assert code == 0
    assert "fits" in out.splitlines()[1]
    assert "KV pool" in out


def test_too_large_is_an_answer(capsys, monkeypatch) -> None:
    arguments = ("--model", "llama-3.1-70b", "--gpu", "rtx-4090-24gb", "--context-tokens", "8192")
    code, out, _ = run(capsys, monkeypatch, *arguments, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["fits"] is False
    assert record["max_concurrent_sessions"] == 0
    assert record["shortfall_bytes"] > 100 * 2**30
    assert any("would fit: " in warning for warning in record["warnings"])


def test_vllm_log_is_compared_line_by_line(capsys, monkeypatch, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(VLLM_LOG)
    _, out, _ = run(capsys, monkeypatch, *BASE, "--log", str(log), "--json")
    record = json.loads(out)
    assert record["engine_version"] == "0.19.0"
    assert record["max_num_seqs"] == 256  # taken from the log
    lines = {line["line"]: line for line in record["log"]}
    assert lines["weights_gib"]["reason"] == "within the interval"
    assert "matches --max-num-seqs 1024" in lines["activation_gib"]["reason"]
    assert "follows from the lines above" in lines["kv_cache_gib"]["reason"]


def test_quantised_weights_are_recognised_in_a_log(capsys, monkeypatch, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(VLLM_LOG.replace("15.27", "8.80"))
    _, out, _ = run(capsys, monkeypatch, *BASE, "--log", str(log), "--json")
    lines = {line["line"]: line for line in json.loads(out)["log"]}
    assert "matches --quantization" in lines["weights_gib"]["reason"]


def test_sglang_log_is_recognised(capsys, monkeypatch, tmp_path: Path) -> None:
    log = tmp_path / "sglang.log"
    log.write_text(SGLANG_LOG)
    _, out, _ = run(capsys, monkeypatch, *BASE, "--log", str(log), "--json")
    record = json.loads(out)
    assert record["engine"] == "sglang"
    assert {line["line"] for line in record["log"]} >= {"weights_gib", "kv_cache_gib"}


def test_log_of_another_model_is_a_warning(capsys, monkeypatch, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(VLLM_LOG)
    other = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm-80gb", "--log", str(log), "--json")
    _, out, _ = run(capsys, monkeypatch, *other)
    assert any("the log is of Qwen/Qwen3-8B" in text for text in json.loads(out)["warnings"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "nope", "--gpu", "h100-sxm-80gb"), "'nope'"),
        (("--model", "qwen3-8b", "--gpu", "h100"), "'h100'"),
        (("--model", "qwen3-8b"), "'--gpu'"),
        ((*BASE, "--gpu-memory-utilization", "1.7"), "1.7"),
        ((*BASE, "--tensor-parallel-size", "3"), "3"),
        ((*BASE, "--context-tokens", "-1"), "-1"),
        ((*BASE, "--sessions", "0"), "0"),
        ((*BASE, "--max-num-seqs", "many"), "many"),
        ((*BASE, "--engine-version", "0.6.3"), "0.6.3"),
        ((*BASE, "--engine-version", "newest"), "newest"),
        ((*BASE, "--log", "absent.log"), "absent.log"),
        ((*BASE, "--contxt-tokens", "1"), "--contxt-tokens"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, arguments: tuple[str, ...], named: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_no_log_is_named(capsys, monkeypatch, tmp_path: Path) -> None:
    log = tmp_path / "notes.txt"
    log.write_text("nothing of interest")
    code, _, err = run(capsys, monkeypatch, *BASE, "--log", str(log))
    assert code == 2
    assert "notes.txt" in err
