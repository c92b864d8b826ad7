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
# # 03 · Budget the latency
#
# Which GPU meets my SLO, and where do the milliseconds go?

# %% [markdown]
# **At a glance.**
#
# - You will learn to split a turn into its stages, the queue included, to tell the two phases of a GPU apart, and to
#   choose by limits first and by price second.
# - Input: the scenario of notebook 00, the GPUs of 02; here also `streams`.
# - Output: `results.json` with the candidates, their attainment, cost and 90 % intervals, and a turn's stages.
# - Runtime: seconds, no GPU. Times are modelled (accuracy: docs/accuracy.md), prices and network are quoted.
# - Read first: [02 · Size the VRAM](02_size_vram.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
streams: int = 0  # sessions that are answered at once; 0 takes the scenario's
slo: str = ""  # preset of data/slo.yaml; empty takes the scenario's limits
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from dataclasses import replace
from random import Random

import pandas as pd
from matplotlib import pyplot as plt

from kit import article, budget, catalog, notebook, plots, prices
from kit import scenario as scenarios
from kit import workload as workloads
from kit.decision import decide
from kit.engine_config import EngineConfig, resolve
from kit.simulator.answers import columns
from kit.steptime import fitted

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("03_budget_latency", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# The load is the scenario's: all its sessions are answered at once, each at another turn of its conversation, and a
# new one starts where one ends.
# That is what notebook 02 sized the memory for, and the most that such agents ask for between bursts.

# %%
case = case.model_copy(update={"sessions": streams or case.sessions})
limits = budget.preset(slo) if slo else case.slo
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
config = case.config(run.model, **flags)
cards = [catalog.gpu(key) for key in dict.fromkeys([*case.gpus, run.gpu.key])]
tried = [budget.candidate(case, run.model, card, config, limits) for card in cards]

# %%
book = [*prices.own_prices(case.prices), *prices.book()]
shortlist = budget.ranked([budget.priced(row, book) for row in tried if row])
named = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2el_s": "E2EL"}
kept = ", ".join(f"{named[key]} {limits[key]:g} s" for key in named if limits.get(key))
told = [f"{case.sessions:,} sessions at once, 95 % of the turns within {kept or 'no limit: only the price counts'}"]
told += [budget.sentence(row) for row in shortlist[:5]]
sure = next((row for row in shortlist if row["slo_attainment_interval"][0] >= 0.95), None)
told.append(f"cheapest that keeps them even at the slow end: {budget.hardware(sure) if sure else 'none of these'}")
print("\n".join(told))

# %%
asked = replace(config, gpu_count=case.gpu_count)
sized = run.earlier("02_size_vram") or {"results": decide(case, run.model, run.gpu, asked, case.demand())}
best = sized["results"]["recommended"] or sized["results"]["replicas"] or {"gpu_count": 8}
mine = next((row for row in shortlist if row["gpu"] == run.gpu.key), None)
needed = budget.hardware(mine) if mine and mine["meets"] else f"no number of {run.gpu.key} tried here"
print(f"On this run's GPU the memory asks for {budget.hardware({'replicas': 1, **best, 'gpu': gpu})} (notebook 02),")
print(f"the limits for {needed}")

# %% [markdown]
# **Reading it.** *Keeps* means that at the modelled speed 95 % of the turns are within every limit.
# The range beside it is what would be in time if the machine were as slow, or as fast, as the model may be wrong
# (90 %).
# Where its low end lies far below 95 %, the choice is a guess that notebook 04 has to confirm; where it lies above,
# the model's error does not matter to this choice.
# Memory may ask for more GPUs than the limits, because notebook 02 holds every session at its longest context at
# once; here each is at another turn.
#
# **Predict** before you read on: of the time to a turn's first token, how much is prefill?
#
# ## Where do the milliseconds of a turn go?
#
# A turn passes the network, the API server with its tokeniser, the queue, the prefill and the decode.
# The article's sum (D1) has the first, the fourth and the last.
# One replica of this run's GPU answers its share of the sessions, and then one session alone.

# %%
one = budget.machine(run.model, run.gpu, replace(config, gpu_count=best["gpu_count"]))
crowd = min(budget.MOST_STREAMS, -(-case.sessions // best.get("replicas", 1)))
loads = {"alone": 1, f"{crowd} at once": crowd}
played = {name: budget.turns(one, one.play(budget.streams(case, count))) for name, count in loads.items()}
factors = (one.basis.ttft_factor, one.basis.tpot_factor)
steps = budget.waterfall(played, factors)

# %%
ms = pd.DataFrame({name: table[["ttft_s", "decode_s", "e2el_s"]].mean() * 1e3 for name, table in played.items()}).T
took = {label: {row["group"]: row["took"] for row in steps if row["label"] == label} for label in budget.STAGES}
decoding = {"first decode step": took.pop("first decode step"), "decode, all": ms["decode_s"], "= answer": ms["e2el_s"]}

# %%
network = budget.preset("network")
there = f"{network['low_s'] * 1e3:.0f} to {network['high_s'] * 1e3:.0f}"
rows = [{"stage": "network, each way", **dict.fromkeys(loads, there), "provenance": "quoted"}]
for label, found in {**took, "= first token": ms["ttft_s"], **decoding}.items():
    rows.append({"stage": label, **{load: f"{found[load]:,.1f}" for load in loads}, "provenance": "modelled"})

# %%
preset = workloads.load(case.workload or "simple-chat")
drawn = workloads.generate(preset, 0, sessions=200)
tools = [turn.pause_after_s for each in drawn for turn in each.turns if turn.pause_kind not in ("", "human")]
pause = f"{sum(tools) / len(tools) * 1e3:,.0f}" if tools else "none"

# %%
called = {"stage": f"a tool, where one is called ({case.workload or 'simple-chat'})", **dict.fromkeys(loads, pause)}
rows.append(called | {"provenance": "quoted"})
print(notebook.table(rows))
print(f"\nms of a mean turn; 90 % of errors: first token x/÷ {factors[0]:.2f}, decode x/÷ {factors[1]:.2f}")

# %%
busy = ms.loc[f"{crowd} at once"]
whole = f"{busy['ttft_s'] / busy['e2el_s']:.1%} of the answer's {busy['e2el_s'] / 1e3:.1f} s"
finding = f"First token after {busy['ttft_s']:,.0f} ms, {whole}"
under = f"{run.model.key} · {one.config.gpu_count}x {plots.short_name(run.gpu)} · modelled, whiskers 90 %"
plots.spans(steps, finding, under, xlabel="Time since the turn reached the server (ms)")
plt.show()

# %% [markdown]
# **Reading it.** A session's context was read in the turn before and is still cached, so prefill has only the new
# tokens to read, and API, tokeniser and queue are no small part of the wait beside it.
# The tokeniser reads the whole prompt again each turn, cached or not.
# The queue is the wait for the step under way, and for others' prompts.
# It is what grows with the load; the rest is paid alone as well.
#
# ## What happens when all come at once?
#
# The load above is even. A burst is not: every session sends its first prompt at the same moment, nothing is cached.

# %%
firsts = [workloads.Session(key, 0.0, [next(budget.conversation(case, Random(key)))]) for key in range(crowd)]
wave = pd.DataFrame(columns(one.play(firsts)))
waits = (wave["first_s"] - wave["arrival_s"]).sort_values()
in_time = int((waits <= (limits.get("ttft_s") or 1e9)).sum())
print(f"{crowd} first prompts at once, modelled: first tokens after {waits.min():.2f} to {waits.max():.2f} s")
print(f"{in_time} of them within the limit; the last one waits x/÷ {factors[0]:.2f} (90 %)")

# %% [markdown]
# **Reading it.** The last one waits for the prefill of all the others.
# No flag shortens that; more replicas do, and so does a shared prefix that is cached before the burst.
# Notebook 01 finds the largest burst that passes.
#
# ## Which limits does this GPU keep?
#
# The presets of data/slo.yaml, each with its source, on one replica of this run's GPU under the same load.

# %%
presets = ("voice", "chat", "chat-streamed", "coding", "background")
rows = [
    {"preset": budget.preset(name)["title"]}
    | {key.upper(): budget.preset(name)[key] or "-" for key in ("ttft_s", "tpot_s", "e2el_s")}
    | {load: f"{budget.attainment(table, budget.preset(name)):.0%}" for load, table in played.items()}
    | {"at the slow end": f"{budget.attainment(played[f'{crowd} at once'], budget.preset(name), factors):.0%}"}
    | {"provenance": "modelled"}
    for name in presets
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** The table shows the share of turns that keep every limit of a line.
# Chat as the article has it, the full answer within 2 s, is a limit on the answer's length: 200 tokens leave 7.5 ms
# for each; the first decode step above says what one takes here.
# Read as it comes, the same answer has 50 ms a token.
#
# ## Which GPU, then?
#
# First the limits, then the price (article A3).
# For each card: the fewest GPUs that keep the limits for all sessions, as replicas of one, two, four or eight.
# The price is the cheapest on-demand one of the price book.

# %%
print(notebook.table(budget.shown(shortlist)))
print("\nPrices on demand, quoted:")
for row in shortlist:
    print(
        f"  {row['gpu']}: {row['price']['provider']}, {row['price']['date']}",
        "(stale)" * bool(row["price"]["is_stale"]),
    )

# %%
limit = limits.get("ttft_s")
bars = [
    {"label": budget.hardware(row), "group": "TTFT p90", "start": 0, "end": row["ttft_s"]["p90"] * 1e3}
    | {"interval": [row["ttft_s"]["p90"] * 1e3 * row["factors"][0] ** sign for sign in (-1, 1)]}
    | {"text": f"{row['usd_per_hour']:.2f} USD/h" if row["usd_per_hour"] else "no price"}
    for row in shortlist
]
finding = f"{sum(row['meets'] for row in shortlist)} of {len(shortlist)} cards keep the limits"
mark = (limit * 1e3, f"limit {limit:g} s") if limit else None
under = f"{run.model.key} · in the order of the shortlist · modelled, whiskers 90 %, prices quoted"
plots.spans(bars, finding, under, limit=mark, xlabel="TTFT p90 (ms)")
plt.show()

# %% [markdown]
# **Reading it.** The column *data* says what is behind a line: measured (runs of that model family on that card were
# published), transfer, new_family or new_gpu (one of the two was), new (neither: a guess).
# A card whose whisker crosses the limit can be the right choice, but not before notebook 04.
#
# ## What if tokens per second chose instead?
#
# More sessions on the same GPU give more tokens per second, and dollar, for a while.
# The article: three times the tokens at twice the TTFT is the wrong choice for a user who waits (A3).

# %%
ladder = sorted({min(budget.MOST_STREAMS, max(1, round(crowd * times))) for times in (0.1, 0.25, 0.5, 1, 2, 4)})
levels = [budget.judge(one, case, count, limits) for count in ladder]
costed = [budget.priced({**row, "replicas": 1, "gpus": row["gpu_count"]}, book) for row in levels]
rows = [
    {"sessions": row["streams"], "tokens/s": row["output_tokens_per_s"], "TTFT p90 ms": row["ttft_s"]["p90"] * 1e3}
    | {"TPOT p90 ms": row["tpot_s"]["p90"] * 1e3, "in time": f"{row['slo_attainment_fraction']:.0%}"}
    | {"USD/M tokens": row["usd_per_million_output_tokens"], "provenance": "modelled"}
    for row in costed
]
print(notebook.table(rows))

# %%
pairs = [(few, many) for few in levels for many in levels if many["streams"] > few["streams"]]
gains = [many["output_tokens_per_s"] / few["output_tokens_per_s"] for few, many in pairs]

# %%
gain, (few, many) = min(zip(gains, pairs, strict=True), key=lambda one: abs(one[0] - 3))
later = many["ttft_s"]["p90"] / few["ttft_s"]["p90"]
voiced = budget.judge(one, case, many["streams"], budget.preset("voice"))["slo_attainment_fraction"]
print(
    f"{few['streams']} to {many['streams']} sessions: {gain:.1f} times the tokens/s at {later:.1f} times the TTFT p90"
)
print(f"Then in time: {many['slo_attainment_fraction']:.0%}; within the limits of the preset voice: {voiced:.0%}")

# %% [markdown]
# **Reading it.** Tokens per second rise as long as more rows share a step's reading of the weights, and fall when the
# KV cache no longer holds the sessions and their contexts are computed again and again.
# Three times the tokens at twice the TTFT is a bad trade only where the limit has no room for it, so we rank by the
# limits and not by either figure.
#
# ## Which GPU for which phase?
#
# Prefill multiplies: all tokens of a prompt at once, so it follows the FLOP/s.
# Decode reads: the weights and the cache for one more token, so it follows the memory bandwidth (D3).
# For a model that fits every card from 24 GB up, 7B in 16 bits:

# %%
small = catalog.model("mistral-7b-v0.3")
keys = dict.fromkeys(["h100-sxm-80gb", "h100-pcie-80gb", "rtx-5090-32gb", "rtx-4090-24gb", "l40s-48gb"])
plain, alone = replace(config, gpu_count=1, quantization=None), replace(case.demand(), sessions=1, paused_sessions=0)
keys |= {run.gpu.key: None} if scenarios.hold(small, run.gpu, plain, alone).answer.fits else {}
speeds = [budget.phases(small, catalog.gpu(key)) for key in keys]
heads = {"gpu": "GPU", "bf16 TFLOP/s": "TFLOP/s", "prefill_tokens_per_s": "prefill tokens/s"}
heads |= {"TB/s": "TB/s", "decode_tokens_per_s": "decode tokens/s", "basis": "data"}
heads |= {"provenance": "provenance"}
print(notebook.table([row | {"provenance": "modelled"} for row in speeds], heads), "\nTFLOP/s and TB/s: datasheets")

# %%
base = speeds[0]
kinds = {"prefill of 8,192 tokens": ("prefill_tokens_per_s", 0), "decode, one stream": ("decode_tokens_per_s", 1)}
pairs = [(row, kind, *kinds[kind]) for row in speeds for kind in kinds]
ratio = [(row, kind, row[name] / base[name], row["factors"][at]) for row, kind, name, at in pairs]
bars = [
    {"label": plots.short_name(catalog.gpu(row["gpu"])), "group": kind, "start": 0, "end": times}
    | {"interval": [times / factor, times * factor], "text": f"{times:.2f}"}
    for row, kind, times, factor in ratio
]

# %%
by_key = {row["gpu"]: row for row in speeds}
rtx = [by_key["rtx-5090-32gb"][name] / base[name] for name, _ in kinds.values()]
finding = f"An RTX 5090 prefills at {rtx[0]:.0%} and decodes at {rtx[1]:.0%} of an H100 SXM's speed"
under = f"{small.key} · bf16 · modelled, whiskers 90 %"
plots.spans(bars, finding, under, limit=(1, "H100 SXM"), xlabel="times an H100 SXM")
plt.show()

# %% [markdown]
# **Reading it.** Long prompts that no cache holds want FLOP/s; long answers of a small model run well on a card with
# fast memory and little else.
# Agents with a working prefix cache are of the second kind, agents that lose it of the first.
#
# ## What does a turn's TTFT do to a task of 45 turns?
#
# A coding task has 45 calls at the median (data/scenarios/coding-agent.yaml), one after the other, so its first tokens
# add up (D4).
# One task alone, its context kept or lost at each pause:

# %%
coding = scenarios.load("coding-agent")
coder = catalog.model(coding.model)
single = replace(coding.demand(), sessions=1, paused_sessions=0)
fits = scenarios.smallest_count(coder, run.gpu, coding.config(coder), single)
count = fits.memory.config.gpu_count if fits else scenarios.COUNTS[-1]
worker = budget.machine(coder, run.gpu, coding.config(coder, gpu_count=count))
tasks = {what: budget.task(worker, coding, keep_kv=keep) for what, keep in (("kept", True), ("lost", False))}

# %%
rows = [
    {"context": what, "calls": row["calls"], "first tokens s": row["ttft_s"], "further tokens s": row["decode_s"]}
    | {"half TTFT saves s": row["ttft_s"] / 2, "half TPOT saves s": row["decode_s"] / 2}
    | {"provenance": "modelled"}
    for what, row in tasks.items()
]
print(f"{coder.key} on {worker.config.gpu_count}x {run.gpu.key}")
print(notebook.table(rows))
clean, needed = 0.99**coding.turns, 0.95 ** (1 / coding.turns)
print(f"\nIf 99 % of the turns are in time, {clean:.0%} of the tasks have no late turn; for 95 % it takes {needed:.2%}")

# %% [markdown]
# **Reading it.** "Optimise TTFT first" is right where contexts are lost: then every call reads tens of thousands of
# tokens again.
# Where they are kept, first tokens are a small part, and the answers' length and TPOT decide how long a task takes.
# A limit that holds per turn does not hold per task: 45 turns are 45 chances to be late.
#
# ## Where does the model break?
#
# It knows a card as well as published runs do.
# Where there are none, the same question gets the same kind of answer, with a wider interval and a warning:

# %%
known, old = catalog.model("llama-3.1-8b"), catalog.gpu("t4-16gb")
for spec, card in ((known, catalog.gpu("h100-sxm-80gb")), (run.model, run.gpu), (run.model, old)):
    basis = fitted(spec, card, resolve(EngineConfig(), spec, card))
    print(f"{spec.key} on {card.key}: TTFT x/÷ {basis.ttft_factor:.2f}, TPOT x/÷ {basis.tpot_factor:.2f}")
    print("   ", *(basis.warnings or ["measured: runs of this family on this card were published"]))

# %% [markdown]
# Other limits: no network of ours was measured; a queue near capacity stretches further than the factors of the
# stages tell; speculative decoding and offloading are not modelled; the price book has no price for some cards.
#
# ## Does the article hold?
#
# The verdict follows from the numbers; *holds with a condition* means that only the second number does.
# First what this run found, then the article's own cases.

# %%
decode_s = played[f"{crowd} at once"]["tpot_s"].mean()
both_ways_s = network["low_s"] + network["high_s"]
short_s = played["alone"]["ttft_s"].mean() + 19 * played["alone"]["tpot_s"].mean() + both_ways_s

# %%
loaded = played[f"{crowd} at once"].mean(numeric_only=True)
numbers = {"turn_s": loaded["e2el_s"] + both_ways_s, "short_turn_s": short_s}
numbers |= {
    "wait_s": loaded["api_s"] + loaded["queue_s"],
    "output_tokens": case.output_tokens_per_turn,
    "few": 0.1 / decode_s,
    "many": 0.5 / decode_s,
}
numbers |= {"many_in_time": many["slo_attainment_fraction"], "many_voiced": voiced, "token_times": gain}
numbers |= {"few_sessions": few["streams"], "many_sessions": many["streams"], "ttft_times": later}
notebook.prose_table([*article.rows("03", numbers), *article.rows("03")])

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: what share of the turns has a first token within 100 ms at this load?
# 2. Twiddle: how many sessions of the ladder keep the preset `voice`? Take the largest of `ladder`, 0 for none.
# 3. Frob: take your own limits: `kit run --notebooks 03 --set slo=voice`, or a scenario of your own.

# %% tags=["exercise"]
within_100_ms = None
# solution
within_100_ms = budget.attainment(played[f"{crowd} at once"], {"ttft_s": 0.1})

# %% tags=["exercise"]
voice_sessions = None
# solution
spoken = [budget.judge(one, case, row["streams"], budget.preset("voice")) for row in levels]
voice_sessions = max((row["streams"] for row in spoken if budget.met(row)), default=0)

# %% tags=["exercise"]
right = [float((played[f"{crowd} at once"]["ttft_s"] <= 0.1).mean())]
asked = [budget.judge(one, case, row["streams"], budget.preset("voice")) for row in levels]
right.append(max((row["streams"] for row in asked if budget.met(row)), default=0))
print("\n".join(notebook.check(*pair) for pair in zip((within_100_ms, voice_sessions), right, strict=True)))

# %% [markdown]
# ## Decision

# %%
where = f"A turn among {crowd} on {one.config.gpu_count}x {run.gpu.key}"
told.append(
    f"{where}: first token after {busy['ttft_s']:,.0f} ms (x/÷ {factors[0]:.2f}), all after {busy['e2el_s']:,.0f} ms"
)

# %%
results = {"slo": {name: limits.get(name) for name in named}, "sessions": case.sessions, "candidates": shortlist}
results |= {"means_ms": ms.to_dict("index"), "stages": steps}
results |= {"burst_last_ttft_s": float(waits.max()), "tasks": tasks, "phases": speeds, "ladder": levels}

# %% tags=["nbval-check-output"]
run.finish(results, told)

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - split a turn into stages, alone and under the scenario's load, and saw what a burst adds,
# - ranked cards by the limits they keep and then by price, and saw what a ranking by tokens takes instead,
# - told prefill from decode, and a turn's TTFT from a task's time.
#
# Next: notebook 04 measures the chosen engine and GPU.
# What is modelled here is compared with measurements in notebook 06.
#
# **Test configuration.** No hardware. vLLM (or SGLang) at the newest version of `data/engines`, default flags but
# `--max-model-len` at the scenario's longest context; step times from `data/coefficients`; prompts and answers 20 %
# around the scenario's, at least 400 turns judged; limits from `data/slo.yaml`, prices from `data/prices.yaml`.
# Accuracy: docs/accuracy.md.
# Words and formulas: docs/glossary.md.
