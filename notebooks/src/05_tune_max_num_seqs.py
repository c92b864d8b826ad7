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
# # 05 · Tune max_num_seqs
#
# Which `--max-num-seqs`, and which companions?

# %% [markdown]
# **At a glance.**
#
# - You will learn what each value of `--max-num-seqs` costs, how a few levels on one engine start find the right one,
#   and why a start of its own has to confirm it.
# - Input: the scenario of notebook 00, GPUs and flags of 02; `duration_s` of a level, `max_boots`.
# - Output: `results.json` with the flags, the limits, every measured level, and whether a start confirmed them.
# - Runtime: seconds. No GPU by default: the engine runs in virtual time on a machine with hidden speed, so what stands
#   here is modelled. With `source` live the same cells start your engine (`engine_command`) or take a server as it is
#   (`base_url`), and last about 15 minutes; with recorded they read a tuning.
# - Read first: [04 · Load test](04_load_test.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
sessions: int = 0  # that arrive within duration_s; 0 takes 80 % of what the closed loops carried
duration_s: float = 60.0  # of a level with arrivals
max_boots: int = 3  # engine starts at most
truth: int = 7  # seed of the machine that hides behind the emulator
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only; it is not restarted
engine_command: str = ""  # starts the engine, with {flags} and {port}; live only
api_key_env: str = ""  # environment variable that holds the server's key, live only
recorded_run: str = ""  # folder of a tuning, recorded only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

from matplotlib import pyplot as plt

from kit import article, measure, notebook, plots, plots_load
from kit import scenario as scenarios
from kit.decision import decide
from kit.engine_config import resolve
from kit.memory import plan
from kit.tune.ask import How, Question, answer, emulated, neighbours
from kit.units import gib

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("05_tune_max_num_seqs", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# GPUs and flags come from notebook 02 where it has run, else from its arithmetic.
# One replica is tuned, with the limits of the scenario.

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
config = case.config(run.model, gpu_count=case.gpu_count, **flags)
sized = run.earlier("02_size_vram") or {"results": decide(case, run.model, run.gpu, config, case.demand())}
best = sized["results"]["recommended"] or sized["results"]["replicas"] or {"gpu_count": 8}
config = scenarios.parallel(run.model, replace(config, gpu_count=best["gpu_count"]))
full = resolve(config, run.model, run.gpu)

# %%
limits = {"slo_ttft_s": case.slo["ttft_s"], "slo_tpot_s": case.slo["tpot_s"]}
load = {"sessions": sessions or None, "duration_s": duration_s, **limits}
what = (names["model"], run.gpu.key, config, case.workload)
question = Question.of(source, *what, engine_command=engine_command, base_url=base_url, truth=truth, **load)
goal = question.goal()

# %% tags=["nbval-ignore-output"]
scratch = tempfile.TemporaryDirectory()
folder = Path(recorded_run if source == "recorded" else f"{output_dir}/load" if output_dir else scratch.name)
how = How(1 if question.way == "base_url" else max_boots, api_key_env or None, own=False)
if question.way != "simulate":
    print(f"Measuring; what is there so far stands in {folder / 'tuning.jsonl'}")
result = answer(question, folder, how)

# %%
chosen, levels = result.recommended.get("max_num_seqs"), result.evidence
modelled = emulated(question, folder)
label, provenance = measure.label("emulator" if modelled else source, base_url), "modelled" if modelled else "measured"
verdict = "confirmed by a start of its own" if result.confirmed else "not confirmed"
told = [f"Source: {label}"]
told += [f"Tuned: {full.gpu_count}x {run.gpu.key}, {run.model.key}, {full.engine} {full.engine_version}"]
if chosen:
    pairs = " ".join(f"{flag}={value}" for flag, value in result.engine_args.items())
    told += [line.replace("=", " ") for line in textwrap.wrap(pairs, 80, break_on_hyphens=False)]
    told += [f"max_num_seqs {chosen}: {verdict}; limited by {result.limited_by}"]
    in_time = f"{result.slo_attainment_fraction:.0%} of the turns within {goal.slo_ttft_s:g} s TTFT"
    told += [f"{result.goodput_requests_per_s:.3g} turns/s in time: {in_time} and {goal.slo_tpot_s:g} s TPOT"]
else:
    told += ["No value of max_num_seqs meets these limits on this machine"]
told += [f"{result.boots} engine starts, {len(levels)} levels; predicted beforehand: {result.predicted_max_num_seqs}"]
print("\n".join([*told, *result.notes]))

# %% [markdown]
# **Reading it.** With the default source the engine is our scheduler on a machine whose speed, overheads and KV pool
# were drawn from the seed `truth`; nothing here knows them, and the tuning has to find what suits that machine.
# So it shows that the search works, and nothing about a GPU.
# Your own engine goes through the same cells with `kit run --live`, or without a notebook with `kit tune`.
#
# `max_num_seqs` is the number of turns that the engine runs at once; others wait in its queue.
# **Predict** before you read on: what happens to the time per token, and what to the time to first token, if it is
# twice as large?
#
# ## What did one engine start show?
#
# A closed loop that holds exactly n turns ready makes the engine run n at once, whatever its limit, so one start with
# a generous limit shows them all.
# Turns are those of the scenario's sessions, without their pauses.

# %%
heads = {"concurrency": "at once", "requests_per_s": "turns/s", "in_time": "in time", "ttft_p95_s": "TTFT p95 s"}
heads |= {"tpot_p95_s": "TPOT p95 s", "kv": "KV used", "hits": "cached", "provenance": "provenance"}
rows = [
    one | {"in_time": f"{one['slo_attainment_fraction']:.0%}", "provenance": provenance}
    | {"kv": one["kv_cache_usage_mean"], "hits": one["prefix_hit_fraction"]}
    | {f"{name}_p95_s": one[f"{name}_s"]["p95"] for name in ("ttft", "tpot")}
    for one in sorted(levels, key=lambda one: one["concurrency"] or 0)
]  # fmt: skip
print(notebook.table([row for row in rows if row["kind"] == "closed"], heads))

# %%
crossed = [
    {"limit": name, "most turns at once": at, "90 %": "{} to {}".format(*spread) if spread else "-"}
    | {"provenance": provenance}
    for (name, at), spread in zip(result.limits.items(), result.limits_interval.values(), strict=True)
]
print(notebook.table(crossed) if crossed else "One turn alone is too slow: there is nothing to bracket")

# %% [markdown]
# **Reading it.** More turns share each step's reading of the weights, so turns per second rise and each turn's tokens
# come later.
# *tpot* and *ttft* are where too few turns stay within the limit, *kv_cache* where the pool is full (tokens that
# sessions share counted once), *knee* where more turns at once no longer finish more per second.
# A limit is unknown where the levels did not reach it.
#
# ## Which value serves the load best?
#
# Sessions now arrive as the scenario says, and at half of the time some come at once.
# A client that lets in at most n turns shows what the engine would do with the limit n, so these levels need no
# restart either.

# %%
heads = {"limit": "at once", "start": "start", "goodput_requests_per_s": "in time/s", "in_time": "in time"}
heads |= {"ttft_p95_s": "TTFT p95 s", "tpot_p95_s": "TPOT p95 s", "preemptions": "preempted"}
heads |= {"provenance": "provenance"}
open_rows = [
    row | {"limit": min(row["max_num_seqs"], row["concurrency"] or row["max_num_seqs"]), "start": row["boot"]}
    for row in rows
    if row["kind"] == "open"
]
open_rows.sort(key=lambda row: (row["start"], row["limit"]))
print(notebook.table(open_rows, heads) if open_rows else "No load was tried")

# %%
under = f"{label} · {full.gpu_count}x {plots.short_name(run.gpu)}"
plt.figure(figsize=(8, 6.4))
plots_load.goodput_by_limit(levels, result.limits, chosen, goal.slo_ttft_s, under)
plt.show()

# %% [markdown]
# **Reading it.** Left of the best value turns wait for a place and miss the TTFT limit; right of it they share steps
# with too many others and miss the TPOT limit, or the KV pool overflows and turns are computed again.
# Where the curve is flat, this load never fills the batch: then the closed loops' limit stands, since it protects the
# engine when more comes.
#
# ## Was it predicted?
#
# The same search on our own model gives the value that it begins with.
# It sets the first bracket, no more.

# %%
prior = result.predicted_max_num_seqs
rows = [{"max_num_seqs": "predicted", "value": prior, "provenance": "modelled"}]
rows += [{"max_num_seqs": "found", "value": chosen, "provenance": provenance}]
rows += [{"max_num_seqs": f"default of {full.engine}", "value": full.max_num_seqs, "provenance": "quoted"}]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** A prediction that is off by a factor costs two or three more levels, not a wrong value.
# On a real GPU the difference says how far the model is to be trusted there; notebook 06 corrects it.
#
# ## What would the neighbours cost?
#
# In virtual time every value can have a start of its own, so the tuned one is held against brute force: with the
# tuning's load, and with half as much again, which is more than this machine carries.
# On a real engine each line is a restart, so there only what the tuning measured stands.

# %%
tried = {min(1024, full.max_num_batched_tokens, max(1, round((chosen or 1) * times))) for times in (0.25, 0.5, 1, 2, 4)}
runs = {
    times: neighbours(question, folder, how, sorted(tried), times) for times in (1.0, 1.5) if question.way == "simulate"
}
rates = {
    times: {n: sum(one.goodput_requests_per_s for one in found) / len(found) for n, found in beside.items()}
    for times, beside in runs.items()
} or {1.0: {row["limit"]: row["goodput_requests_per_s"] for row in open_rows} or {1: 0.0}}
heads = {
    "value": "max_num_seqs",
    1.0: "in time/s",
    "of": "of the best",
    1.5: "at 1.5x the load",
    "provenance": "provenance",
}
top = {times: max(found.values(), default=0) or 1.0 for times, found in rates.items()}

# %%
rows = [
    {times: found.get(n) for times, found in rates.items()}
    | {"value": f"{n}{' (tuned)' if n == chosen else ''}", "of": f"{rate / top[1.0]:.0%}", "provenance": provenance}
    for n, rate in sorted(rates[1.0].items())
]  # fmt: skip
print(notebook.table(rows, {name: text for name, text in heads.items() if rows and name in rows[0]}))

# %% [markdown]
# **Reading it.** Too small a value wastes the engine at any load: turns wait although a place would cost nothing.
# Above the best value this load seldom fills the batch, so that a larger one hardly shows; what a full batch of that
# size costs is in the closed loops above.
# Beyond what the machine carries no value helps all turns, and the admission limits below keep those in time that are
# let in.
# The default is a guess for any load.
#
# ## Which flags go with it?

# %%
companions = [{"flag": name, "value": value, "why": result.reasons[name]} for name, value in result.recommended.items()]
notebook.prose_table(companions or [{"flag": "max_num_seqs", "value": "unknown", "why": "; ".join(result.notes)}])

# %% [markdown]
# **Reading it.** `--max-num-seqs` alone does not protect a first token: what queues longer than the limit is late
# anyway.
# The admission flags refuse it at once, so that a router or a burst GPU can take it (notebook 07).
#
# ## Is it the lever on VRAM?
#
# The article says so (F5).
# The engine reserves memory for a sampler batch of that many rows at start, and what is left becomes the KV pool.

# %%
sizes = {n: plan(run.model, run.gpu, replace(config, max_num_seqs=n)) for n in sorted({16, chosen or 64, 1024})}
rows = [
    {"max_num_seqs": n, "KV pool GiB": gib(one.pool.size_bytes), "KV pool tokens": one.kv_cache_tokens()}
    | {"provenance": "modelled"}
    for n, one in sizes.items()
]
print(notebook.table(rows))

# %%
pools = [row["KV pool GiB"] for row in rows]
double = plan(run.model, run.gpu, replace(config, kv_cache_dtype="fp8")).kv_cache_tokens()
running = max((row["running_mean"] or 0 for row in open_rows), default=0)
numbers = {"sessions": case.sessions, "chosen": chosen or 0, "running": running, "largest": max(sizes)}
numbers |= {"over_sessions": (chosen or 0) / case.sessions, "moved": 1 - min(pools) / max(pools)}
numbers |= {"fp8": double / max(1, plan(run.model, run.gpu, config).kv_cache_tokens())}
numbers |= {"spread": 1 - min(rates[1.0].values(), default=0) / top[1.0]}
notebook.prose_table(article.rows("05", numbers))

# %% [markdown]
# ## Where does the method break?
#
# The search believes what one start shows; a start whose memory differs could behave otherwise, hence the confirming
# ones.
# It also needs limits that one turn alone can meet.
# Here they are a hundredth of the scenario's:

# %%
harsh = {"slo_ttft_s": goal.slo_ttft_s / 100, "slo_tpot_s": goal.slo_tpot_s / 100}
impossible = replace(question, way="simulate", truth=truth, server="", **harsh)
with tempfile.TemporaryDirectory() as other:
    refused = answer(impossible, Path(other), How())
print(f"{refused.status}, limited by {refused.limited_by}, recommended: {refused.recommended or 'nothing'}")
print("\n".join(refused.notes))

# %% [markdown]
# An engine that is too slow for one turn is too slow for all; no flag helps, a faster GPU or a smaller model does.
#
# Other limits: the load is drawn from the scenario's workload, and a load of another shape has another best value;
# prompts are synthetic; one replica is tuned, what a router does in front of several is not in it.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: how many of the closed levels met both limits for at least 90 % of their turns?
# 2. Twiddle: what fraction of the best goodput does half of the tuned value reach? `rates[1.0]` has goodput by value.
# 3. Frob: tune your own server: `kit tune --base-url http://HOST:PORT --model .. --gpu .. --workload ..`.

# %% tags=["exercise"]
levels_met = None
# solution
levels_met = sum(one["kind"] == "closed" and one["slo_attainment_fraction"] >= 0.9 for one in levels)

# %% tags=["exercise"]
half_reaches = None
# solution
half = min(rates[1.0], key=lambda n: abs(n - (chosen or 1) / 2))
half_reaches = rates[1.0][half] / top[1.0]

# %% tags=["exercise"]
right = [len([one for one in levels if one["kind"] == "closed" and one["slo_attainment_fraction"] >= 0.9])]
right.append(rates[1.0][min(rates[1.0], key=lambda n: abs(n - (chosen or 1) / 2))] / top[1.0])
given = (levels_met, half_reaches)
print("\n".join(notebook.check(*pair) for pair in zip(given, right, strict=True)))

# %% [markdown]
# ## Decision

# %% tags=["nbval-check-output"]
print("\n".join(told[1:]))

# %% tags=["nbval-ignore-output"]
results = {"status": result.status, "recommended": result.recommended, "engine_args": result.engine_args}
results |= {"confirmed": result.confirmed, "limited_by": result.limited_by, "limits": result.limits}
results |= {"reasons": result.reasons, "predicted_max_num_seqs": prior, "boots": result.boots}
results |= {"goodput_requests_per_s": result.goodput_requests_per_s, "neighbours": rates[1.0], "source": source}
results |= {"slo_attainment_fraction": result.slo_attainment_fraction, "slo": case.slo, "provenance": provenance}
results |= {"label": label, "engine": full.engine, "engine_version": full.engine_version, "gpu_count": full.gpu_count}
run.finish({**results, "notes": list(result.notes), "evidence": levels}, told)
scratch.cleanup()

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - found on one engine start how many turns at once the limits, the KV pool and the knee of the throughput allow,
# - saw which value serves arriving sessions best, and let a start of its own confirm it,
# - derived the flags that belong to it, and held the article's advice beside it.
#
# Next: notebook 06 takes measurements and corrects the model, where it was off.
#
# **Test configuration.** By default no GPU: the scheduler of the engine's newest version in `data/engines` in virtual
# time, on the hidden machine of seed `truth`; default flags but `--max-model-len` at the scenario's longest context.
# Sessions of the scenario's workload, loads of seeds 1 and 2, a tenth of them at once at half of `duration_s`.
# How often the search finds the best value, over six settings and 20 machines: docs/performance.md.
# Words and formulas: docs/glossary.md.
