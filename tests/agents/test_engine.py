"""The agents of notebooks/agents on a real vLLM on the CPU, its parser `hermes` reading their tool calls.

The model is small and has learnt four answers by heart (taught_model.py). What this shows: vLLM's chat template,
tool parser, parallel calls, streaming and strict schemas, with three frameworks' clients, from question to answer.
What it does not show: that a model chooses tools well, or any speed.
`make engine ENGINE=vllm` and `make agents` install both; `make test-engines` runs this, skipped by name without them.
"""

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_agents import FRAMEWORKS, PYTHON, ROUNDS, run_agent, started

from kit.engines import Engine, launch, start
from kit.engines.launch import ENVIRONMENTS, free_port

TOOLS = {"--enable-auto-tool-choice": "", "--tool-call-parser": "hermes"}
ANSWER = "It left this morning and takes two days."

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON.exists(), reason="no agents in .venv-agents: make agents"),
    pytest.mark.skipif(not list(ENVIRONMENTS.glob("vllm/installed-*")), reason="no vllm: make engine ENGINE=vllm"),
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("vllm")
    teach = [str(ENVIRONMENTS / "vllm/bin/python"), str(Path(__file__).with_name("taught_model.py")), str(folder / "m")]
    subprocess.run(teach, check=True, capture_output=True, timeout=600)
    flags = {"max_num_seqs": 16, "max_model_len": 4096, "enforce_eager": True, **TOOLS}
    plan = launch("vllm", str(folder / "m"), flags, port=free_port(), served_model_name="taught")
    with start(plan, folder / "engine.log", deadline_s=400) as engine:
        yield engine


def asked_of(framework: str, engine: Engine, file: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the agent told at its end, and the calls it made."""
    with started("record", "--upstream", engine.launch.base_url, "--out", str(file)) as proxy:
        told = run_agent(framework, proxy, "--max-tokens", "400", *more, model="taught")
    return told, [json.loads(line) for line in file.read_text().splitlines()[1:]]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_vllm_reads_the_tool_calls_of_an_agent(framework: str, vllm: Engine, tmp_path: Path) -> None:
    told, calls = asked_of(framework, vllm, tmp_path / "agent.jsonl")
    rounds = ROUNDS[framework]
    assert told["tools_run"] == {"find_order": rounds, "delivery_days": rounds}
    assert told["answers"] == [ANSWER, ANSWER]
    assert told["streamed_chunks"] > len(ANSWER)  # a busy engine may put two characters into one chunk
    assert [call["finish_reason"] for call in calls].count("tool_calls") == rounds
    assert [call["tool_results"] for call in calls].count(2) == rounds  # both asked for in one answer
    assert all(call["stream"] and call["failure"] is None and not call["estimated"] for call in calls)
    answers = [call["output_tokens"] for call in calls if call["finish_reason"] == "stop"]
    assert answers == [len(ANSWER) + 1] * 2  # characters and the end: vLLM's own count


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_vllm_serves_an_orchestrator_and_three_sub_agents(framework: str, vllm: Engine, tmp_path: Path) -> None:
    told, calls = asked_of(framework, vllm, tmp_path / "agent.jsonl", "--orchestrate")
    rounds = ROUNDS[framework]
    assert told["tools_run"] == {"find_order": 3 * rounds, "delivery_days": 3 * rounds}
    assert told["answers"] == [ANSWER, ANSWER]
    assert all(call["failure"] is None for call in calls)
    specialists = {f"{told['session']}-{name}" for name in ("orders", "deliveries", "returns")}
    assert specialists <= {call["session"] for call in calls if call["parent"] == told["session"]}


def test_vllm_calls_the_tool_that_a_client_names(vllm: Engine) -> None:
    """A named tool needs no taught model: the schema alone decides what may be written."""
    schema: dict[str, Any] = {"type": "object", "properties": {"postcode": {"enum": ["10115", "80331"]}}}
    schema |= {"required": ["postcode"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "delivery_days", "parameters": schema, "strict": True}}
    body: dict[str, Any] = {"model": "taught", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    body |= {"max_tokens": 300, "tool_choice": {"type": "function", "function": {"name": "delivery_days"}}}
    url = f"{vllm.launch.base_url}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        (call,) = json.load(answer)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "delivery_days"
    assert json.loads(call["function"]["arguments"])["postcode"] in ("10115", "80331")
