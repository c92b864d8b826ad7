# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Plug in agents
#
# Do LangGraph, CrewAI and AutoGen work on it, and what load do they make?

# %% [markdown]
# **At a glance.**
#
# - You will learn to point an agent at your endpoint, to see its calls, to record them without their content, and to
#   play a hundred of them before a hundred users do.
# - Input: the scenario of notebook 00; `make agents` for agents that run here, else a recording of them.
# - Output: `results.json` with what each agent did, and what many of them do to the KV cache and the SLO.
# - Runtime: below half a minute. No GPU by default: an emulator of the engine answers, so speeds here are modelled.
#   With `source` live and a `base_url` the same agents talk to your server.
# - Read first: [04 · Load test](04_load_test.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
recording: str = ""  # a file of kit record; empty runs the agents here, or takes the recording that is shipped
copies: int = 100  # agents in the replay
over_s: float = 4.0  # seconds in which they start
source: str = "emulator"  # emulator or live
base_url: str = ""  # OpenAI-compatible server, live only
api_key_env: str = ""  # environment variable that holds its key, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

# %%
from kit import article, measure, notebook, plots, simulator
from kit import scenario as scenarios
from kit import workload as workloads
from kit.catalog.paths import DATA
from kit.decision import decide
from kit.loadgen import Options
from kit.loadgen.plan import own_arrivals
from kit.simulator.answers import answers

# %% tags=["nbval-ignore-output"]
case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("10_plug_in_agents", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# One replica of the engine, as notebook 02 sized it.

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": "auto"}
config = case.config(run.model, gpu_count=case.gpu_count, **flags)
sized = run.earlier("02_size_vram") or {"results": decide(case, run.model, run.gpu, config, case.demand())}
best = sized["results"]["recommended"] or sized["results"]["replicas"] or {"gpu_count": 8}
config = scenarios.parallel(run.model, replace(config, gpu_count=best["gpu_count"]))
limit_s = case.slo["ttft_s"] or 1.0
served = {"model": names["model"], "gpu": run.gpu.key, "options": Options(limit_s, log=lambda line: None)}
bench = measure.bench(source, **served, config=config, base_url=base_url, api_key_env=api_key_env)

# %% [markdown]
# Each agent is a script in `notebooks/agents` that takes any base URL.
# Between it and the engine stands `kit record`, which passes everything on and notes when, how long and for which
# session, but not what was said.

# %% tags=["nbval-ignore-output"]
root = DATA.parent
python = root / ".venv-agents/bin/python"
scripts = ["langgraph_agent.py", "autogen_agent.py", "crewai_agent.py", "langgraph_agent.py --orchestrate"]
told, file = [], Path(recording or DATA / "workloads/agents.jsonl")
ran_here = python.exists() and not recording
if ran_here:
    file = Path(tempfile.mkdtemp(prefix="agents-", dir=output_dir or None)) / "agents.jsonl"
    proxy = measure.record(bench.target, file)

# %% tags=["nbval-ignore-output"]
key = {"OPENAI_API_KEY": os.environ.get(api_key_env, "none")}
if ran_here:
    ask = f"--base-url {proxy.launch.base_url} --model {bench.target.model}".split()
    more = {"capture_output": True, "cwd": root / "notebooks/agents", "env": os.environ | key, "timeout": 240}
    with ThreadPoolExecutor(len(scripts)) as pool:
        done = list(pool.map(lambda script: subprocess.run([python, *script.split(), *ask], **more), scripts))
    told = [json.loads(one.stdout.splitlines()[-1]) for one in done if not one.returncode]
    proxy.stop()
    print("".join(f"{' '.join(one.args[1:3])} did not finish\n" for one in done if one.returncode))
print("The agents ran here" if ran_here else f"No agents ran here (make agents installs them): recording {file.name}")

# %%
calls = pd.read_json(file, lines=True).iloc[1:].reset_index(drop=True)
calls["agent"] = calls["session"].str.extract(r"^(\w+-\w+)")[0].fillna(calls["session"])
calls["framework"] = calls["agent"].str.extract(r"^(\w+)")[0]

# %%
agents = calls.groupby("agent")
works = calls.groupby("framework")
good = [name for name, one in works if one["tool_results"].any() and one["first_token_s"].notna().all()]
failed = int(calls["failure"].notna().sum())

# %% [markdown]
# Then many of them: over HTTP in real time as `kit load --workload FILE` plays them, and in virtual time.

# %%
preset = workloads.load(str(file))
many = list(workloads.generate(preset, 0, sessions=copies))
starts = np.linspace(0, over_s, copies, endpoint=False).tolist()
wave = own_arrivals([replace(one, arrival_s=at) for one, at in zip(many, starts, strict=True)])
summary, frame = bench.measure(replace(wave, name="agents"))
planned = sum(len(one.turns) + sum(len(child.turns) for turn in one.turns for child in turn.children) for one in many)
waits = (frame["first_token_s"] - frame["scheduled_s"]).dropna()

# %%
limits, step_time, _ = simulator.replica(run.model, run.gpu, config)
within, crowds = f"within {limit_s:g} s", []
for count in (100, 1000, 3000):
    drawn = workloads.generate(preset, 0, sessions=count)
    at_once = [replace(one, arrival_s=10 * at / count) for at, one in enumerate(drawn)]
    sim = simulator.Simulation(simulator.SimulationConfig(limits), step_time).run(at_once)
    found = answers(sim, limit_s, None, set())
    crowds.append(
        {"agents": count, "calls": found["completed"], "TTFT p50 s": found["ttft_s"]["p50"]}
        | {"p99 s": found["ttft_s"]["p99"], within: f"{found['slo_attainment_fraction']:.0%}"}
        | {"KV max": f"{found['kv_cache_usage']['max']:.0%}", "cached": f"{found['prefix_hit_fraction']:.0%}"}
        | {"preemptions": found["preemptions"], "provenance": "modelled"}
    )

# %%
tail_s, most, cached = waits.quantile(0.99), crowds[-1], calls["cached_tokens"].sum() / calls["input_tokens"].sum()
decision = [
    f"{', '.join(sorted(good))}: tools called, answers streamed, {failed} of {len(calls)} calls failed",
    f"{copies} agents within {over_s:g} s: TTFT p99 {tail_s:.2g} s ({bench.source}, client {summary['verdict']})",
    f"{most['agents']:,} in 10 s on {config.gpu_count}x {run.gpu.key}: {most[within]} of calls {within} (modelled)",
    f"{cached:.0%} of the prompt tokens were found cached; the recorded workload is {file.name}",
]
print("\n".join(decision))

# %% [markdown]
# **Reading it.** All three frameworks speak to the same URL; none knows what hardware answers.
# What they do to it is in the recording, and a recording can be multiplied before the users are.
#
# **Predict** before you read on: for how much of its time is an agent inside the model?
#
# ## What does an agent do to a server?

# %%
rows = [
    {"agent": name, "calls": len(one), "sessions": one["session"].nunique(), "tool results": one["tool_results"].sum()}
    | {"streamed": int(one["first_token_s"].notna().sum()), "prompt tokens": one["input_tokens"].sum()}
    | {"answer tokens": one["output_tokens"].sum(), "failed": int(one["failure"].notna().sum())}
    for name, one in agents
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** Each agent was asked two questions.
# LangGraph and AutoGen keep one conversation, CrewAI begins a new one with each task, and AutoGen phrases its answer
# without the tools in the prompt: the same work, other calls.
# The one with the most calls leads three specialists, which are agents themselves.

# %%
where = f"{config.gpu_count}x {plots.short_name(run.gpu)}"
under = f"{measure.label(bench.source, base_url)} · {where} · tools take 50 and 120 ms"

# %%
plt.figure(figsize=(9, 4.6))
plots.agents_timeline(calls, under)
plt.show()

# %% [markdown]
# **Reading it.** Bars are calls, gaps are tools and the framework's own work.
# A session is a chain: the next prompt is the last one, the answer and the tool's result.
# The lead's specialists start together, and the lead waits for the last of them.
#
# ## What does it send again?
#
# Each prompt repeats what was said before; only the rest is new to the engine if its cache still has the beginning.

# %%
shared = calls.groupby("prefix")["prefix_tokens"].min()
rows = [
    {"prompt tokens": calls["input_tokens"].sum(), "found cached": f"{cached:.0%}", "distinct beginnings": len(shared)}
    | {"the longest shared one": int(shared.max()), "answer tokens": calls["output_tokens"].sum()}
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** The system prompt and the tools' descriptions are the shared beginning: every session of one agent
# starts with it.
# Its length is estimated from its share of the bytes; all other counts are the server's.
#
# ## A hundred of them
#
# `kit load --workload FILE` plays the recording: the same turns, prompts of the same length, the same waits.
# Here they start within a few seconds, each with texts of its own.

# %%
rows = [
    {"agents": copies, "calls": summary["sent"], "answered": summary["completed"]}
    | {"in flight": summary["peak_in_flight"], "TTFT p50 s": waits.median(), "p99 s": tail_s}
    | {"KV max": f"{summary['server']['kv_cache_usage'] or np.nan:.1%}", "client": summary["verdict"]}
    | {"provenance": "modelled" if bench.source == "emulator" else "measured"}
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** A replayed session asks when its last answer has come and the recorded wait is over, so a slow server
# delays the agent as it would in life.
#
# ## And thousands?
#
# The same recording through the simulator, in virtual time: so many agents start within ten seconds.

# %%
print(notebook.table(crowds))

# %% [markdown]
# **Reading it.** These agents are small, so the KV cache is not what ends first: the queue is.
# An agent that carries a codebase in its prompt turns that around; notebook 01 has such a workload, and your own is
# one `kit record` away.
#
# ## Does the article hold?
#
# The verdict follows from the numbers of this run.

# %%
hits = {}
for name in ("vllm", "sglang"):
    limits, step_time, _ = simulator.replica(run.model, run.gpu, replace(config, engine=name))
    sim = simulator.Simulation(simulator.SimulationConfig(limits), step_time).run(many)
    hits[name] = answers(sim, limit_s, None, set())["prefix_hit_fraction"]

# %%
numbers = {"frameworks": len(good), "failed": failed, "calls": len(calls)}
numbers |= {"vllm_hits": hits["vllm"], "sglang_hits": hits["sglang"], "hits_ahead": hits["sglang"] - hits["vllm"]}
notebook.prose_table(article.rows("10", numbers))

# %% [markdown]
# **Reading it.** The shorter a prompt, the more of it is a last block that is not full.
# vLLM keeps blocks of 16 tokens, SGLang keeps tokens, so agents as small as these find more there; with the longer
# sessions of notebook 04 the difference all but vanishes.
#
# ## Where does the model break?
#
# The emulator's answers are words without sense: it shows that calls, tools and streams work, not that an agent is
# any good.
# It asks for tools whenever there are some and no result yet; a real model decides, and needs a server that was
# started with `--enable-auto-tool-choice` and a parser for its format.
# `make test-engines` runs these agents on vLLM's CPU build with a small model that has learnt its tool calls by heart:
# parser, parallel calls, streams and strict schemas are the real ones there; the choice of a tool is not tested.
# A recording knows sessions by the header `x-session-id`, else by the messages that a call repeats.
# An agent that rewrites its history without sending the header looks like several.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: for which share of its time is the first agent of the table inside the model?
# 2. Twiddle: how many calls would 40 agents make that lead three specialists each?
# 3. Frob: start `kit record --upstream http://HOST:PORT --port 8010`, point an agent of your own at port 8010, and
#    play it: `kit load --workload recording.jsonl --base-url http://HOST:PORT --model NAME`.

# %% tags=["exercise"]
first = next(one for _, one in agents)
inside = None
# solution
inside = (first["end_s"] - first["start_s"]).sum() / (first["end_s"].max() - first["start_s"].min())

# %% tags=["exercise"]
calls_of_forty = None
# solution
calls_of_forty = 40 * agents.size().max()

# %% tags=["exercise"]
spans = first["end_s"] - first["start_s"]
right = [spans.sum() / (first["end_s"].max() - first["start_s"].min())]
right.append(40 * max(len(one) for _, one in agents))
print("\n".join(notebook.check(*pair) for pair in zip((inside, calls_of_forty), right, strict=True)))

# %% [markdown]
# ## Decision
#
# First what any machine must find again with these parameters, then what was found this time.

# %% tags=["nbval-check-output"]
yes = {True: "yes", False: "no"}
print(f"Called their tools and streamed every answer: {', '.join(sorted(good))}")
print(f"Calls of the {len(agents)} agents: {len(calls)}, none failed: {yes[not failed]}")
print(f"{copies} agents replayed: {planned} calls planned, {summary['sent']} sent, {summary['completed']} answered")

# %% tags=["nbval-ignore-output"]
if bench.engine:
    bench.engine.stop()
results = {"ran_here": ran_here, "workload": str(file), "agents": [dict(one) for one in told], "many": crowds}
results |= {"replay": {name: summary[name] for name in ("sent", "completed", "failed", "verdict", "peak_in_flight")}}
run.finish(results, decision)

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - ran an agent of each framework against the endpoint, through a proxy that records,
# - saw calls, tools and sub-agents on one time axis, and what of each prompt was sent before,
# - played a hundred of them over HTTP and thousands in virtual time.
#
# This is the last notebook; `kit compare runs/*` sets the GPUs that you ran it for beside each other.
#
# **Test configuration.** By default no GPU: `kit emulate`, `kit record`, `kit load` and the agents on one host, the
# agents' frameworks at the versions of `requirements/agents.lock`; tools that take 50 and 120 ms; at most 160 tokens
# of answer; the replay with texts of the recorded lengths. Words and formulas: docs/glossary.md.
