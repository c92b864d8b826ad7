"""Real agents of three frameworks through kit record to the emulator; test_engine.py has them on a real vLLM.

`make agents` installs the frameworks, `make test-agents` runs this; without them it is skipped by name.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import workload
from kit.traces import read

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-agents/bin/python"
KIT = [sys.executable, "-c", "from kit.cli import main; main()"]
MODEL = "llama-3.1-8b"
FRAMEWORKS = ("langgraph", "autogen", "crewai")
# CrewAI begins a conversation for each of the two questions, the others go on with the first.
ROUNDS = {"langgraph": 1, "autogen": 1, "crewai": 2}

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(not PYTHON.exists(), reason="no agents in .venv-agents: make agents"),
]


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """A kit server on a free port: its base URL."""
    process = subprocess.Popen([*KIT, *arguments, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with started("emulate", "--model", MODEL, "--gpu", "h100-sxm-80gb") as url:
        yield url


def run_agent(framework: str, base_url: str, *more: str, model: str = MODEL) -> dict[str, Any]:
    """What an agent told at its end."""
    script = ROOT / f"notebooks/agents/{framework}_agent.py"
    command = [str(PYTHON), str(script), "--base-url", base_url, "--model", model, "--max-tokens", "40", *more]
    key = {**os.environ, "OPENAI_API_KEY": "sk-for-this-test"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=key)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_agent_calls_its_tools_and_streams_its_answers(framework: str, engine: str, tmp_path: Path) -> None:
    file = tmp_path / "agent.jsonl"
    with started("record", "--upstream", engine, "--out", str(file)) as proxy:
        told = run_agent(framework, proxy)
    rounds = ROUNDS[framework]
    assert told["tools_run"] == {"find_order": rounds, "delivery_days": rounds}  # both asked for in one answer
    assert all(told["answers"])
    assert len(told["answers"]) == 2
    assert told["streamed_chunks"] >= 2 * 40
    calls = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len(calls) == {"langgraph": 3, "autogen": 3, "crewai": 4}[framework]
    assert all(call["stream"] and call["failure"] is None and not call["estimated"] for call in calls)
    assert [call["tool_results"] for call in calls].count(2) == rounds
    assert "sk-for-this-test" not in file.read_text()
    (session,) = workload.generate(workload.load(str(file)), 0)
    own = [*session.turns, *(turn for one in session.turns for child in one.children for turn in child.turns)]
    assert len(own) == len(calls)
    waits = [turn.pause_after_s for turn in own] + [
        child.arrival_s for turn in session.turns for child in turn.children
    ]
    assert max(waits) >= 0.1  # the slower tool's time


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_orchestrator_waits_for_three_sub_agents(framework: str, engine: str, tmp_path: Path) -> None:
    file = tmp_path / "agent.jsonl"
    with started("record", "--upstream", engine, "--out", str(file)) as proxy:
        told = run_agent(framework, proxy, "--orchestrate")
    rounds = ROUNDS[framework]
    assert told["tools_run"] == {"find_order": 3 * rounds, "delivery_days": 3 * rounds}
    calls = read(str(file), "recorded").calls
    lead = told["session"]
    specialists = {call.parent for call in calls if call.session.startswith(f"{lead}-") and "/" not in call.session}
    assert specialists == {lead}
    (session,) = workload.generate(workload.load(str(file)), 0)
    assert len(session.turns[0].children) >= 3  # all started by the first answer


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_server_that_is_not_there_is_told_and_nothing_else_is_called(framework: str) -> None:
    script = ROOT / f"notebooks/agents/{framework}_agent.py"
    command = [str(PYTHON), str(script), "--base-url", "http://127.0.0.1:9", "--model", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "onnection" in done.stderr
    assert "talks to" not in done.stderr  # no attempt at another host
