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
# # 04 · Load test
#
# What does this engine on this GPU do, up to a burst of 10,000?

# %% [markdown]
# **At a glance.**
#
# - You will learn to read a throughput and latency curve, what a burst does to it, which of two clocks to believe,
#   and when a client's numbers are its own fault.
# - Input: the scenario of notebook 00, GPUs and flags of 02; `concurrency`, `burst` (10,000 for the full one).
# - Output: `results.json` with the curve, the burst, sessions, the client's verdict, and where they came from.
# - Runtime: below a minute. No GPU by default: an emulator of the engine answers, so what stands here is modelled.
#   With `source` live and a `base_url` the same cells measure a server; with recorded they read a run.
# - Read first: [02 · Size the VRAM](02_size_vram.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
max_num_seqs: int = 0  # 0 takes the engine's default
concurrency: str = "1,4,16,64"  # streams of the ladder's levels
requests_per_stream: int = 3  # of a level, at least ten in all
input_tokens: int = 500  # prompt of a request, ladder and burst
output_tokens: int = 24  # answer of a request, ladder and burst
burst: int = 200  # requests at once
sessions: int = 8  # agent sessions of the scenario's workload
truth: int = 7  # seed of the machine that hides behind one of the emulators
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
api_key_env: str = ""  # environment variable that holds its key, live only
recorded_run: str = ""  # folder of a run, recorded only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

import jsonschema
import numpy as np
from matplotlib import pyplot as plt

from kit import article, measure, notebook, plots, plots_load
from kit import scenario as scenarios
from kit import workload as workloads
from kit.decision import decide
from kit.engine_config import resolve
from kit.loadgen import Options, fixed_sessions, level
from kit.loadgen.plan import own_arrivals
from kit.predict import Ask, predict

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("04_load_test", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# GPUs and flags come from notebook 02 where it has run, else from its arithmetic.
# One replica is measured.

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype, "max_num_seqs": max_num_seqs}
config = case.config(run.model, gpu_count=case.gpu_count, **flags)
sized = run.earlier("02_size_vram") or {"results": decide(case, run.model, run.gpu, config, case.demand())}
best = sized["results"]["recommended"] or sized["results"]["replicas"] or {"gpu_count": 8}
config = scenarios.parallel(run.model, replace(config, gpu_count=best["gpu_count"]))
full = resolve(config, run.model, run.gpu)

# %%
limit_s = case.slo["ttft_s"] or 1.0
host = measure.host_limits(10_000)
folder = recorded_run if source == "recorded" else output_dir and f"{output_dir}/load"
options = Options(limit_s, case.slo["tpot_s"], log=lambda line: None)
served = {"model": names["model"], "gpu": run.gpu.key, "options": options}
bench = measure.bench(source, **served, config=config, place=folder, base_url=base_url, api_key_env=api_key_env)

# %%
streams = [int(number) for number in concurrency.split(",")]
ask = fixed_sessions(input_tokens, output_tokens)
counts = [max(10, requests_per_stream * number) for number in streams]
levels = [level("concurrency", number, ask, requests=count) for number, count in zip(streams, counts, strict=True)]
levels.append(level("burst", burst, ask))
summaries, frames = zip(*[bench.measure(one) for one in notebook.progress(levels, "levels")], strict=True)

# %%
curve = [
    {"concurrency": number, "output_tokens_per_s": one["output_tokens_per_s"], "requests_per_s": one["requests_per_s"]}
    | {f"ttft_{part}_s": one["ttft_scheduled_s"][part] for part in ("p50", "p90", "p99")}
    | {"tpot_p50_s": one["tpot_s"]["p50"], "sent": one["sent"], "verdict": one["verdict"]}
    for number, one in zip(streams, summaries[:-1], strict=True)
]
in_time = [row for row in curve if (row["ttft_p90_s"] or np.inf) <= limit_s]
best_level = max(in_time, key=lambda row: row["output_tokens_per_s"], default=None)
wave, wave_frame = summaries[-1], frames[-1]

# %%
label, how = measure.label(bench.source, base_url), "modelled" if bench.source == "emulator" else "measured"
speeds = [f"{row['output_tokens_per_s'] or 0:,.0f}" for row in curve]
keeps = "none of the levels" if best_level is None else "{concurrency} streams".format(**best_level)
passing = "unknown, the client was the limit" if wave["verdict"] != "VALID" else wave["burst"]["largest_passing_burst"]
ranked = wave_frame.sort_values(["scheduled_s", "sent_s"])
waits = (ranked["first_token_s"] - ranked["scheduled_s"]).to_numpy()
last_s = np.nanmax(waits)
told = [
    f"Source: {label}",
    f"Configured as {full.gpu_count}x {run.gpu.key}, {run.model.key}, {full.engine} {full.engine_version}",
    f"At {concurrency} streams: {', '.join(speeds)} tokens/s",
    f"Most output with p90 TTFT within {limit_s:g} s: {keeps}",
    f"{burst:,} at once: the last first token after {last_s:.2g} s, {wave['failed']} without an answer",
    f"Largest burst with 95 % within {limit_s:g} s: {passing}",
    f"Client's verdict: {', '.join(row['verdict'] for row in curve)}; burst {wave['verdict']}",
]
there = measure.recordings()
print("\n".join([*told, f"GPU runs in data/recorded: {', '.join(there)}" if there else "No GPU run is recorded yet"]))

# %% [markdown]
# **Reading it.** With the default source a model of the engine answers in real time over HTTP.
# It schedules as the engine does, and takes the seconds of a step from a fit; client, network and waiting are real.
# So the shape of the curve can be trusted, its speed only as far as docs/accuracy.md says.
# Your own server goes through the same cells with `kit run --base-url URL`.
#
# **Predict** before you read on: with 4 times the streams, how many times the tokens per second, and how many times
# the TTFT?
#
# ## What is measured, and by which clock?
#
# TTFT is the time to the first token, TPOT the time per token after it; docs/glossary.md has the formulas and how
# other tools differ.
# Each request has two clocks for TTFT: *from the send*, and *from the schedule*, which is when it was due.
# Between the two it waits inside the client.
# All figures here count from the schedule unless they say otherwise.

# %%
one = wave_frame.sort_values("first_token_s").iloc[-1]
times = ("scheduled_s", "sent_s", "first_token_s", "last_token_s", "end_s")
print(notebook.table([{"moment": name, "s after the start": one[name], "provenance": how} for name in times]))
print(f"\nThe request of the burst that waited longest: {one['output_tokens']:.0f} tokens, {one['chunks']} chunks")

# %% [markdown]
# ## Is this host able to do it?
#
# 10,000 streams end at a kernel's defaults before they reach the engine (article F8).
# The limits hold for the client and for the server, each on its own host.

# %%
print(notebook.table(host, {name: name for name in ("limit", "now", "needed", "enough")}))
short = [row for row in host if row["enough"] is not True]
print("\n".join(["", *(f"{row['limit']}: {row['below it']}.\n  {row['raise it']}" for row in short)]))

# %% [markdown]
# **Reading it.** What is not enough is listed with what happens and the command that raises it.
# The client opens its connections one after the other before a burst, so the backlog matters for clients that do
# not: your agents.
#
# ## How does it go as streams are added?
#
# A closed loop of n streams: each sends its next request when its last one has ended.

# %%
heads = {"concurrency": "streams", "sent": "sent", "output_tokens_per_s": "tokens/s"}
heads |= {f"ttft_{part}_s": f"TTFT {part} s" for part in ("p50", "p90", "p99")}
heads |= {"tpot_p50_s": "TPOT p50 s", "verdict": "verdict", "provenance": "provenance"}
print(notebook.table([row | {"provenance": how} for row in curve], heads))

# %% [markdown]
# **Reading it.** A p99 of fewer than 100 requests would be their maximum by another name, so it is unknown; p90 needs
# ten.
# More streams share each step's reading of the weights, so tokens per second rise almost for nothing, until prompts
# queue for the prefill: then TTFT rises and tokens do not.
#
# ## Was it predicted?
#
# `kit predict` simulates the same closed loop without a server and gives a 90 % interval.

# %%
lengths = {"input_tokens": input_tokens, "output_tokens": output_tokens}
loops = [{"concurrency": n, "requests_per_stream": max(1, sent // n)} for n, sent in zip(streams, counts, strict=True)]
answers = [predict(run.model, run.gpu, config, Ask(**lengths, **loop)) for loop in loops]
predicted = [{"output_tokens_per_s": one["output_tokens_per_s"], "ttft_p90_s": one["ttft_s"]["p90"]} for one in answers]

# %%
verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in curve))
under = f"{label} · {full.gpu_count}x {plots.short_name(run.gpu)}"
plots_load.throughput_over_ttft(curve, predicted, limit_s, f"{under} · client {verdicts}")
plt.show()

# %% [markdown]
# With the emulator as source this compares our model with itself, by way of HTTP, the client and a real clock: it
# checks the path and proves nothing about a GPU.
# To see whether the comparison would notice another machine, the last line is one: an emulator whose speed,
# overheads and KV pool were drawn from the seed `truth` and are not told to anyone.

# %%
hidden = measure.bench("emulator", **served, config=config, truth=truth)
middle = len(streams) // 2
other, _ = hidden.measure(levels[middle])
hidden.engine.stop()
rows = [
    {"machine": what, "streams": streams[at], "predicted tokens/s": answers[at]["output_tokens_per_s"]}
    | {"90 %": "{:,.0f} to {:,.0f}".format(*answers[at]["intervals"]["output_tokens_per_s"])}
    | {"got": got, "got over predicted": got / answers[at]["output_tokens_per_s"], "verdict": word}
    for what, at, got, word in [
        *((source, at, row["output_tokens_per_s"], row["verdict"]) for at, row in enumerate(curve)),
        ("hidden", middle, other["output_tokens_per_s"], other["verdict"]),
    ]
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** Where the client is CLIENT_BOUND, the number got is the client's and no comparison holds.
# Both count what API server and tokeniser take before the engine sees a request: the emulator waits that long before
# it queues one.
# A hidden machine may well lie inside the interval: that is what an interval is for.
# Notebook 06 takes such a machine's measurements and finds its speed.
#
# ## What do agent sessions find after a pause?
#
# Sessions of the scenario's workload arrive a quarter of a second apart.
# To fit a minute, answers are cut to 24 tokens, pauses to half a second, sessions to six turns, and sub-agents are
# left out; prompts are whole.

# %%
drawn = list(workloads.generate(workloads.load(case.workload), 0, sessions=sessions))
cut = [
    [replace(turn, output_len=min(turn.output_len, 24), pause_after_s=min(turn.pause_after_s, 0.5), children=())
     for turn in one.turns[:6]]
    for one in drawn
]  # fmt: skip
staggered = [replace(one, arrival_s=0.25 * at, turns=cut[at]) for at, one in enumerate(drawn)]
trace = replace(own_arrivals(staggered), name="sessions")
agents, agent_calls = bench.measure(trace)

# %%
by_turn = agent_calls.assign(ttft_s=agent_calls["first_token_s"] - agent_calls["scheduled_s"]).groupby("turn")
tokens = by_turn[["prompt_tokens", "cached_tokens"]].sum(min_count=1)
rows = [
    {"turn": turn + 1, "calls": len(group), "prompt tokens": tokens["prompt_tokens"][turn]}
    | {"found cached": f"{tokens['cached_tokens'][turn] / tokens['prompt_tokens'][turn]:.0%}"}
    | {"TTFT p50 ms": group["ttft_s"].median() * 1e3, "verdict": agents["verdict"], "provenance": how}
    for turn, group in by_turn
]
print(notebook.table(rows))
found = agents["server"]["prefix_hit_fraction"]
print(f"\nThe server's own counters: {'not exposed' if found is None else f'{found:.0%} found'}, all turns together")

# %% [markdown]
# **Reading it.** A first turn can find only what sessions share, the system prompt.
# From the second turn on almost all of the prompt was sent before, and after a short pause it is still there.
# A long pause under load may lose it; notebook 01 plays that over an hour.
# Per turn it is told by `usage` in each answer (a vLLM server does so with `--enable-prompt-tokens-details`), in all
# by the metrics page.
#
# ## What does a burst do?

# %%
ranks = np.arange(1, len(waits) + 1)
curves = {"first token": (ranks, waits), f"limit {limit_s:g} s": (ranks, np.full(len(waits), limit_s))}
finding = f"{np.mean(waits <= limit_s):.0%} of {burst:,} at once get a first token within {limit_s:g} s"
axes = {"xlabel": "Rank of arrival", "ylabel": "TTFT from the schedule (s)"}
plots.lines_over(curves, finding, f"{under} · client {wave['verdict']}", **axes)
plt.show()

# %%
absorbed = wave["burst"]
told_burst = {"sent": burst, "answered": wave["completed"], "shed": absorbed["shed_fraction"]}
told_burst |= {"recovered s": absorbed["time_to_recover_s"], "backlog req-s": absorbed["backlog_request_s"]}
told_burst |= {"passing": absorbed["largest_passing_burst"], "waiting": wave["server"]["waiting"]}
print(notebook.table([told_burst | {"verdict": wave["verdict"], "provenance": how}]))
print(f"\n10,000 at the same rate: {last_s * 10_000 / burst:,.0f} s until the last first token (extrapolated)")

# %% [markdown]
# **Reading it.** First tokens come in steps: each step of the engine takes as many prompts as its token budget holds.
# The slope is the speed of prefill, and `--max-num-seqs` does not change it.
# "Passing" is the largest n whose first n had 95 % in time, "recovered" when the last late first token came, and the
# backlog the area of waiting requests over time.
# Nothing is shed, because no limit on waiting requests is set: `kit emulate --max-num-queued-reqs` shows refusals.
# The whole burst: `kit run --notebooks 04 --set burst=10000`.
#
# ## Which clock do you believe?
#
# Coordinated omission is measuring from the send what had to wait to be sent.
# Say a tool promises twice the rate that one stream serves, and keeps one request in flight.
# Then it sends as the closed loop of one stream does, while its requests were due long before.

# %%
alone, calls = bench.measure(level("concurrency", 1, ask, requests=10))
calls = calls.sort_values("sent_s")
due_s = np.arange(len(calls)) / (2 * alone["requests_per_s"])
clocks = {
    "from the schedule": calls["first_token_s"] - due_s,
    "from the send": calls["first_token_s"] - calls["sent_s"],
}
ms = {what: np.quantile(waited, (0.5, 0.9)) * 1e3 for what, waited in clocks.items()}
rows = [{"TTFT": what, "p50 ms": p50, "p90 ms": p90} for what, (p50, p90) in ms.items()]
print(notebook.table([row | {"verdict": alone["verdict"], "provenance": how} for row in rows]))

# %% [markdown]
# **Reading it.** The same requests: a user who was due and had to wait sees the first line, a tool that starts its
# watch at the send reports the second.
# `kit load` sends what is due whatever is in flight, reports both clocks, and counts attainment and goodput from the
# schedule.
#
# ## Can the client's numbers be believed?
#
# A client that is busy measures itself.
# VALID means that its own lag is small against what it measured, whatever the server does; CLIENT_BOUND names what
# was not.

# %%
checks = dict(zip([*(f"{number} streams" for number in streams), "burst"], summaries, strict=True))
checks |= {"sessions": agents}
rows = [
    {"measurement": what, "verdict": one["verdict"], "send lag p99 ms": one["send_lag_s"]["p99"] * 1e3}
    | {"read lag p99 ms": one["read_lag_s"]["p99"] and one["read_lag_s"]["p99"] * 1e3}
    | {"busiest core": f"{max(one['client_cpu_fraction']):.0%}", "reasons": "; ".join(one["verdict_reasons"]) or "-"}
    for what, one in checks.items()
]
notebook.prose_table(rows)

# %% [markdown]
# **Reading it.** A lag means nothing by itself: 10 ms are much beside a TTFT of 30 ms and little beside one of 3 s.
# A figure above whose measurement is CLIENT_BOUND is to be measured again on a quieter or larger client.
#
# ## vLLM or SGLang?
#
# The article: vLLM as the production default, SGLang for multi-step agents and structured output (F4).
# The same sessions go to an emulator of each, then questions whose answer must fit a JSON schema.
# Which is faster only a GPU can say, so no time stands here.

# %%
fields = {"topic": {"enum": ["order", "return"]}, "urgent": {"type": "boolean"}, "refund_usd": {"type": "number"}}
ticket = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": ticket}}
own = {engine: bench} if source == "emulator" else {source: bench}
rivals = [name for name in ("vllm", "sglang") if name not in own]
own |= {name: measure.bench("emulator", **served, config=replace(config, engine=name)) for name in rivals}

# %%
fits = jsonschema.Draft202012Validator(ticket).is_valid
told_by = {name: (agents, agent_calls) if one is bench else one.measure(trace) for name, one in own.items()}
asked = [f"Ticket {number}: the parcel came late. Fill in the form." for number in range(8)]
asks = {name: one for name, one in own.items() if one.target}
valid = {name: sum(fits(one.ask_json(text, form, 100)) for text in asked) for name, one in asks.items()}

# %%
sums = {name: calls[["cached_tokens", "prompt_tokens"]].sum(min_count=1) for name, (_, calls) in told_by.items()}
pages = {name: summary["server"]["prefix_hit_fraction"] for name, (summary, _) in told_by.items()}
hits = {name: one["cached_tokens"] / one["prompt_tokens"] for name, one in sums.items()}
hits |= {name: pages[name] or 0.0 for name, share in hits.items() if np.isnan(share)}
rows = [
    {"server": name, "calls": summary["completed"], "prompt tokens found": f"{hits[name]:.1%}"}
    | {"by its metrics page": "not told" if pages[name] is None else f"{pages[name]:.1%}"}
    | {"preemptions": summary["server"]["preemptions"], "valid JSON": f"{valid.get(name)} of {len(asked)}"}
    | {"provenance": "modelled" if name in ("vllm", "sglang") else how}
    for name, (summary, _) in told_by.items()
]
print(notebook.table(rows))
print("\nSpeed: no GPU has measured the two side by side here")

# %% [markdown]
# **Reading it.** Both engines keep prefixes by default, and on sessions like these they find nearly the same.
# A difference is to be looked for where prefixes branch or memory is short.
# The tokens found are counted from `usage` in each answer; beside them stands what the engine's own counters say.
# An emulator writes valid JSON by construction: the last column shows that request and answer have the same form on
# both.
# How good an engine's grammar is, only the engine shows; `make test-engines` asks the real ones.
#
# ## Does the article hold?
#
# The verdict follows from the numbers of this run; *holds with a condition* means that only the second number does.

# %%
rates = max(row["requests_per_s"] or 0 for row in curve)
numbers = {"burst": burst, "burst_in_time": np.mean(waits <= limit_s), "recover_s": last_s, "times": 10_000 / burst}
first = (calls["first_token_s"] - calls["scheduled_s"]).to_numpy()
numbers |= {"alone_in_time": np.mean(first <= limit_s), "capacity": rates}
turns = np.mean([len(one.turns) for one in drawn])
numbers |= {"turns": turns, "needed": 500 / 60 * turns, "capacity_over_calls": rates / (500 / 60)}
numbers |= {"capacity_over_sessions": rates / (500 / 60 * turns), "vllm_hits": hits["vllm"]}
numbers |= {"sglang_hits": hits["sglang"], "hits_ahead": hits["sglang"] - hits["vllm"]}
shares = {name: count / len(asked) for name, count in valid.items()}
numbers |= {"vllm_valid": shares["vllm"], "sglang_valid": shares["sglang"]}
numbers |= {"valid_ahead": shares["sglang"] - shares["vllm"], "files_needed": host[0]["needed"]}
numbers |= {"limits": len(host), "limits_met": sum(row["enough"] is True for row in host)}
notebook.prose_table(article.rows("04", numbers), {name: name.replace("modelled", how) for name in article.HEADINGS})

# %% [markdown]
# ## Where does the model break?
#
# It assumes requests that the server takes.
# These are twice as long as `--max-model-len`, and each is refused:

# %%
long = fixed_sessions(2 * full.max_model_len, output_tokens)
refused, _ = bench.measure(replace(level("concurrency", 2, long, requests=4), name="too-long"))
print(f"sent {refused['sent']}, completed {refused['completed']}, failed {refused['failures']}")
print(f"TTFT p50: {refused['ttft_s']['p50']} ({refused['ttft_s']['nulls']['p50']})")
print(f"SLO met: {refused['slo_met']}")

# %% [markdown]
# A refused request is a miss, and a percentile that falls among misses is unknown, never zero.
#
# Other limits: a closed loop never sends more than the server takes, so it hides overload; the burst does not.
# The emulator waits for API and tokeniser as long as the model says, and has no network card.
# A burst from one client host is not one from 10,000.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: how many of the ladder's levels have a known p90 TTFT within twice the limit?
# 2. Twiddle: what would be the largest passing burst if the limit were one second? `waits` has the TTFT by rank.
# 3. Frob: measure your own server: `kit run --notebooks 04 --base-url http://HOST:PORT --set burst=50`.

# %% tags=["exercise"]
levels_in_time = None
# solution
levels_in_time = sum((row["ttft_p90_s"] or np.inf) <= 2 * limit_s for row in curve)

# %% tags=["exercise"]
passing_at_one_s = None
# solution
shares_in_time = np.cumsum(waits <= 1.0) / ranks
passing_at_one_s = max(ranks[shares_in_time >= 0.95], default=0)

# %% tags=["exercise"]
right = [sum((row["ttft_p90_s"] or np.inf) <= 2 * limit_s for row in curve)]
right.append(max((n for n in ranks if np.mean(waits[:n] <= 1.0) >= 0.95), default=0))
given = (levels_in_time, passing_at_one_s)
print("\n".join(notebook.check(*pair) for pair in zip(given, right, strict=True)))

# %% [markdown]
# ## Decision
#
# First what any machine must find again with these parameters, then what was found this time.

# %% tags=["nbval-check-output"]
sent, answered = (sum(one[name] for one in checks.values()) for name in ("sent", "completed"))
more = curve[-1]["output_tokens_per_s"] > curve[0]["output_tokens_per_s"]
later = curve[-1]["ttft_p90_s"] > curve[0]["ttft_p90_s"]
hidden_wait = ms["from the schedule"][1] > 2 * ms["from the send"][1]
yes = {True: "yes", False: "no"}
print(f"Source: {label}")
print(f"Ladder {concurrency}, burst {burst:,}, {sessions} sessions: {sent:,} requests sent, {answered:,} answered")
print(f"Most streams against fewest: more tokens/s: {yes[more]}, later first tokens: {yes[later]}")
print(f"95 % of the burst within {limit_s:g} s: {yes[np.mean(waits <= limit_s) >= 0.95]}")
print(f"Half of the sessions' prompt tokens found cached: {', '.join(f'{k} {yes[v > 0.5]}' for k, v in hits.items())}")
print(f"Answers that fit the schema: {', '.join(f'{k} {v} of {len(asked)}' for k, v in valid.items())}")
print(f"From the schedule more than twice the TTFT from the send: {yes[hidden_wait]}")

# %% tags=["nbval-ignore-output"]
bound = [what for what, one in checks.items() if one["verdict"] != "VALID"]
client = "CLIENT_BOUND" if bound else "VALID"
believed = f"The client was the limit in: {', '.join(bound)}" if bound else "The client's numbers can be believed"
taken = {"requests": burst, **absorbed, "failed": wave["failed"], "verdict": wave["verdict"]}
results = {"curve": curve, "burst": taken, "client_verdict": client, "client_bound": bound, "source": source}
results |= {"base_url": base_url or None, "label": label, "provenance": how, "engine": full.engine}
results |= {"engine_version": full.engine_version, "max_num_seqs": full.max_num_seqs, "gpu_count": full.gpu_count}
results |= {"input_tokens": input_tokens, "output_tokens": output_tokens, "prefix_hit_fraction": hits}
started = [one.engine for one in own.values() if one.engine]
for one in started:
    one.stop()
run.finish(results, [*told[:-1], f"{believed} ({client})"])

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - checked the host's limits, measured a ladder of streams and a burst, and held a prediction beside them,
# - saw what agent sessions find in the cache after a pause, on vLLM and SGLang,
# - told both clocks apart, and asked of every figure whether the client could be believed.
#
# Next: notebook 05 finds `--max-num-seqs` and its companions with such measurements.
#
# **Test configuration.** By default no GPU: `kit emulate` and `kit load` on the same host, vLLM and SGLang at the
# newest versions of `data/engines`, default flags but `--max-model-len` at the scenario's longest context; requests
# of `input_tokens` and `output_tokens`, connections opened before the clock starts, `ignore_eos` set; sessions
# drawn from the scenario's workload with seed 0.
# Limits of the host: `data/host_limits.yaml`.
# The load generator's own error: docs/performance.md. Words and formulas: docs/glossary.md.
