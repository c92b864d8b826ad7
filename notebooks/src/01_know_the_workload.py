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
# # 01 · Know the workload
#
# What do agents do to a server?

# %% [markdown]
# **At a glance.**
#
# - You will learn how agents arrive, what their turns re-send, what their pauses cost, and how a burst drains.
# - Input: the scenario of notebook 00 and its workload, a file in data/workloads; or a recorded trace of your own.
# - Output: `results.json` with arrivals and session model, the compute pattern (1 to 4), active, paused and queued
#   sessions, what pauses keep in the cache, and the burst.
# - Runtime: below half a minute, no GPU. Sessions are drawn from a file and simulated, so numbers are modelled
#   unless a table says quoted; none is measured.
# - Read first: [00 · Start here](00_start_here.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
workload: str = ""  # key in data/workloads or a YAML file; empty takes the scenario's
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

import numpy as np
from matplotlib import pyplot as plt

from kit import article, metrics, notebook, plots, traces
from kit import scenario as scenarios
from kit import workload as workloads
from kit.decision import decide
from kit.simulator import Load, Simulation, SimulationConfig, turns
from kit.simulator import replica as one_replica
from kit.simulator.answers import answers
from kit.units import GIB

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("01_know_the_workload", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# The GPUs come from notebook 00: its recommended number of this card, or its replicas where one node is too small.
# On them we play one hour of the workload (its busiest, where it has a daily wave), or its burst from beginning to
# end.

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
config = case.config(run.model, gpu_count=case.gpu_count, **flags)
earlier = run.earlier("00_start_here")
sized = earlier["results"] if earlier else decide(case, run.model, run.gpu, config, case.demand())
best = sized["recommended"] or sized["replicas"] or {"gpu_count": 8}
config = scenarios.parallel(run.model, replace(config, gpu_count=best["gpu_count"]))
limits, step_time, warnings = one_replica(run.model, run.gpu, config)
cluster = SimulationConfig(limits, replicas=best.get("replicas", 1))

# %%
preset = workloads.load(name := workload or case.workload)
kind, counts = preset.arrivals.kind, preset.counts
rate_per_s = None if workload else case.arrivals.get("sessions_per_s")
hour = Load(preset, duration_s=None if kind in ("step", "batch") else 3600.0)
hour = replace(hour, sessions=round(rate_per_s * 3600) if rate_per_s and hour.duration_s else None)
sessions = list(hour.stream()[0])

# %%
sim = turns.play(cluster, step_time, hour)
found, played = answers(sim, case.slo["ttft_s"], case.slo["tpot_s"], set()), turns.table(sim)
number, rule = turns.pattern(sessions[:1000], models=len(case.models), active=case.sessions)
rest, grid_s = turns.pauses(sim, played), np.arange(0, found["simulated_s"], 1.0)
at_once = {state: found["sessions"][state]["max"] for state in ("active", "queued")}
at_once["paused"] = int(turns.level(rest, grid_s).max())

# %%
hardware = f"{cluster.replicas} x " * (cluster.replicas > 1) + f"{best['gpu_count']}x {run.gpu.key}"
print(f"{case.title}: workload {name}, pattern {number}, on {hardware}")
print(f"{len(sessions):,} sessions sent {len(played):,} calls, {turns.peak_calls(played['arrival_s']):,} in a minute")
print("At most {active:,} active, {paused:,} paused and {queued:,} queued at once".format(**at_once))
print(f"The scenario asked for {case.sessions} active and {case.paused_sessions} paused")
refused = [f"refused {found['refused']:,} calls, for example: {why}" for why in found["refusals"]]
print("\n".join(refused[:1] + [f"warning: {text}" for text in warnings]))

# %% [markdown]
# **Reading it.** A session is *active* while the engine works on one of its calls, *queued* while a call waits to
# be admitted, and *paused* while the agent waits for a tool or a person.
# A calculator that puts every session into the batch is wrong by the number of those that are paused.
# Warnings say how far the step time behind the seconds can be trusted; counts of sessions and of new tokens do not
# depend on it.
# A refused call is longer than the scenario's longest context; its session ends there.
#
# **Predict** before you read on: if 500 agents wake within one minute, how many calls is that?
#
# ## Steady or bursty?
#
# The article's example (A2) is an hour of nothing, then 500 in a minute.
# It does not say 500 of what.
# Two workloads read it both ways, and a third line has the same calls as the first, spread evenly at random
# (Poisson).

# %%
roomy = replace(cluster, scheduler=replace(limits, max_model_len=run.model.max_position_embeddings))
wake = {"500 sessions": "silent-hour-then-500", "500 calls": "silent-hour-then-500-calls"}
loads = {what: Load(workloads.load(key)) for what, key in wake.items()}
bursts = {what: turns.table(turns.play(roomy, step_time, load))["arrival_s"] for what, load in loads.items()}
woken = bursts["500 sessions"]
steady = np.random.default_rng(0).random(len(woken)) * woken.max()
memory = scenarios.hold(run.model, run.gpu, config, case.demand()).memory
under = f"{plots.subtitle(memory)} · {hardware}"
plots.calls_per_minute({**bursts, "Poisson": np.sort(steady)}, under)
plt.show()

# %%
coding = [one.arrival_s for one in workloads.generate(workloads.load("azure-code-on-off"), 0, duration_s=3600)]
measures = {"this workload": played["arrival_s"], **bursts, "azure-code-on-off": coding, "Poisson": steady}
azure = {"load": "Azure code trace, 2023", "calls": 8819, "most in 60 s": 723}
azure |= {"IDC 1 s": 13.2, "IDC 60 s": 164, "silent": "unknown", "provenance": "quoted"}
print(notebook.table([*turns.bursts(measures), azure]))

# %% [markdown]
# **Reading it.** IDC, the index of dispersion, is the variance of the calls in a window over their mean; "silent" is
# the share of seconds without a call.
# Poisson arrivals have an IDC of 1 at every width.
# A value that grows with the width means that busy seconds come together, and then an average says nothing about
# the minute that counts.
# The Azure row is computed from the public trace (CC-BY 4.0, November 2023); azure-code-on-off is fitted to it.
#
# ## What does a session look like?

# %%
print(notebook.table(turns.bodies(sessions)))

# %%
roots = played[played["session"] > 0].groupby("session")
spans = (roots["end_s"].max() - roots["arrival_s"].min()).sort_values()
example = played[played["session"] == spans.index[len(spans) // 2]]
plots.session_timeline(next(one for one in sessions if one.key == example["key"].iloc[0]), example, under)
plt.show()

# %% [markdown]
# **Reading it.** Each dark column is a call, as wide as it lasts and as high as the context it leaves behind.
# The light stretches are pauses: nothing runs, and KV cache of that height waits for the next call.
# It is the session that takes the median time.
# What is light is not the server's: an engine twice as fast shortens only the dark part.
#
# ## How much of a prompt is new?
#
# The API keeps no state.
# Each call sends the whole conversation again, and a prefix cache decides whether it is computed again.

# %%
print(notebook.table(turns.growth(played)))
sent, old = played["input_len"].sum(), played["reusable_tokens"].sum()
print(f"\nAll calls sent {sent / 1e6:.1f} M prompt tokens, {sent / (sent - old):.1f} times what was new")
print(f"The simulated cache found {played['hit_tokens'].sum() / sent:.0%} of them")

# %% [markdown]
# **Reading it.** Means over the sessions that reach the call.
# The article's token arithmetic (10,000 conversations of five turns of 200 tokens) counts each turn once.
# The cache can find more than what a session sent before, because all sessions share system prompt and tools.
#
# ## How long should a paused session's KV be kept?
#
# Keeping it saves the next call its prefill.
# Meanwhile the memory serves nobody.
# Below, KV is kept for a fixed time after each call, in a cache without other limits.
# Idle is KV tokens times seconds in pauses, active the same during calls.

# %%
keeps = {"10 s": 10, "1 min": 60, "5 min": 300, "1 h": 3600}
weka = {"10 s": (0.45, 0.79), "1 min": (0.77, 2.2), "5 min": (0.90, 4.8), "1 h": (0.96, 11.9)}
ours = {label: turns.kept(played, seconds) for label, seconds in keeps.items()}
rows = [
    {"KV kept for": label, "sessions of": whose, "prompt tokens found": f"{hits:.0%}"}
    | {"idle per active": idle, "provenance": how}
    for whose, how, points in (("this workload", "modelled", ours), ("Claude Code", "quoted", weka))
    for label, (hits, idle) in points.items()
]
print(notebook.table(rows))

# %%
plots.keeping({"this workload": ours, "Claude Code sessions (quoted)": weka}, under)
plt.show()

# %% [markdown]
# **Reading it.** Quoted: 710 recorded Claude Code sessions (WEKA, kv-cache-tester traces, Apache-2.0, 2026-09);
# their active time is that of the provider.
# The knee lies where most pauses end; the decision names the time that finds nine tenths of what an hour finds.
# To the right of it each per cent of hits costs more idle memory than the one before.
# A faster engine shortens the active time and moves the curve right: idle memory weighs more on a good GPU.
#
# ## How many sessions are active, paused and queued?

# %%
series = found["sessions"]["series"]
curves = {state: (np.array(series["t_s"]) / 60, series[state]) for state in ("active", "queued")}
curves["paused"] = (grid_s / 60, turns.level(rest, grid_s))
finding = "At most {active:,} active, {paused:,} paused, {queued:,} queued".format(**at_once)
plots.lines_over(curves, finding, under, xlabel="Time (minutes)", ylabel="Sessions")
plt.show()

# %%
idle = turns.level(rest, grid_s, (rest["tokens"] - preset.session.shared_prefix.tokens).clip(lower=0))
idle_peak = int(idle.max())
pool_tokens = limits.kv_blocks * limits.block_size * cluster.replicas
idle_gib = idle_peak * memory.kv_bytes_per_token / GIB
print(f"KV of all paused sessions, shared prefix aside: {idle_gib:.1f} GiB at the peak,")
print(f"{idle_peak / pool_tokens:.0%} of the KV pool; running calls take {found['kv_cache_usage']['max']:.0%} at most")

# %% [markdown]
# **Reading it.** Active sessions need memory and compute, paused ones memory only.
# The scenario's `sessions` and `paused_sessions`, on which notebooks 00 and 02 rest, can be checked against this
# figure.
#
# ## Is the prefix still cached after the pause?
#
# vLLM pins nothing.
# A finished call's blocks stay until other requests need the room, the least recently used first.
# So the answer depends on the pause, the traffic in it, and the size of the pool.
# We play the same hour with the whole pool and with less of it.

# %%
least = -(-limits.max_model_len // limits.block_size)
sizes = {f"1/{part} of the pool": max(limits.kv_blocks // part, least) for part in (4, 16)}
tight = {what: replace(cluster, scheduler=replace(limits, kv_blocks=blocks)) for what, blocks in sizes.items()}
smaller = {what: turns.play(one, step_time, hour) for what, one in tight.items()}
by_pool = {"whole pool": found} | {what: answers(one, None, None, set()) for what, one in smaller.items()}

# %%
print(notebook.table(turns.survival(by_pool)))
print("\n" + notebook.table(turns.mixture(by_pool)))

# %% [markdown]
# **Reading it.** A turn is a hit when 90 % of what its session had sent before was still there.
# With less room the same pause survives less often: the pool is the clock, not a time limit.
# A pool larger than all paused sessions together can still lose them, because the sessions that have ended leave
# their cache behind as well.
# TTFT is a mixture: where more than one turn in a hundred misses, the p99 of all turns is a miss's.
#
# ## What does a burst do?
#
# Now first calls only, all in the same instant, on replicas that do nothing else: cold (nothing cached) and warm
# (system prompt and tools cached).
# The number is the scenario's where it has one, else the 500 of the article.

# %%
count, limit_s = int(case.arrivals.get("count", 500)), case.slo["ttft_s"] or 1.0
calls = hour.first_turns(count)
states = {"cold": cluster, "warm": replace(cluster, warm=True)}
waves = {what: turns.table(Simulation(one, step_time).run(calls)) for what, one in states.items()}
ttfts = {what: np.sort(wave["first_s"] - wave["arrival_s"]) for what, wave in waves.items()}
passing = {what: turns.passing_burst(one, step_time, hour, limit_s) for what, one in states.items()}
drains = {what: (wave["first_s"].max(), wave["end_s"].max()) for what, wave in waves.items()}

# %%
curves = {what: (np.arange(1, len(ttft) + 1), ttft) for what, ttft in ttfts.items()}
last_first = " and ".join(f"{drains[what][0]:.3g} s {what}" for what in curves)
finding = f"{count:,} at once: the last first token after {last_first}"
axes = plots.lines_over(curves, finding, under, xlabel="Rank of arrival", ylabel="TTFT (s)")
axes.axhline(limit_s, color="#1f2429", linewidth=0.9, linestyle=":")
axes.text(1, limit_s, f"limit {limit_s:g} s", va="bottom")
plt.show()

# %%
rows = [
    {"cache": what, "calls": len(ttft), "TTFT p50 s": np.median(ttft), "last first token s": drains[what][0]}
    | {"drained s": drains[what][1], "in time": f"{np.mean(ttft <= limit_s):.0%}", "largest passing": passing[what]}
    | {"provenance": "modelled"}
    for what, ttft in ttfts.items()
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** First tokens leave in the order of arrival, so the wait grows with the rank, and the slope is the
# speed of prefill.
# "Largest passing" is the largest burst of which 95 % get their first token within the limit.
# A burst beyond it needs more replicas that are already there: notebook 02 counts how long a new one takes.
#
# ## What do sub-agents add?
#
# An orchestrator sends out workers at once and waits for all of them (workload multi-agent).

# %%
team = turns.table(turns.play(roomy, step_time, Load(workloads.load("multi-agent"), sessions=60)))
print(notebook.table(turns.fan_outs(team)))
spans = team.groupby("key")[["arrival_s", "end_s"]]
peaks = [metrics.peak_in_flight(one["arrival_s"].to_numpy(), one["end_s"].to_numpy()) for _, one in spans]
print(f"\nCalls of one session: {len(team) / len(peaks):.0f} on average, {max(peaks)} of them at once at most")

# %% [markdown]
# **Reading it.** One session counts as several in the batch.
# The join waits for the slowest worker: the parent is paused for the last column, not for the one before.
#
# ## Which compute pattern is mine?
#
# The article names four: a single agent, several models on one GPU, a high-concurrency API, and reasoning with long
# answers.
# The first condition that holds decides; where none does, it is pattern 1.
# "Several models" also counts sub-agents.
# 100 sessions is what the article gives one card (B1); 4,096 tokens is its short context.

# %%
print(notebook.table([{"scenario": case.key} | row for row in rule]))
named = [scenarios.load(key) for key in ("single-agent", "multi-agent", "api-cluster", "reasoning")]
rows = []
for other in named:
    some = list(workloads.generate(workloads.load(other.workload), 0, sessions=200))
    fits, _ = turns.pattern(some, models=len(other.models), active=other.sessions)
    rows.append({"scenario": other.key, "pattern by the rule": fits})
print("\n" + notebook.table(rows))

# %% [markdown]
# ## Can I bring my own trace?
#
# Yes, in the formats of four public ones.
# The project does not ship traces; get them from their publishers: Mooncake (github.com/kvcache-ai/Mooncake), Azure
# (github.com/Azure/AzurePublicDataset), BurstGPT (github.com/HPMLL/BurstGPT), WEKA
# (github.com/callanjfox/kv-cache-tester).
# The two files below are made up, to show the formats.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
(folder / "mooncake.jsonl").write_text(
    """{"timestamp": 0, "input_length": 1200, "output_length": 90, "hash_ids": [1, 2, 3]}
{"timestamp": 4000, "input_length": 1700, "output_length": 60, "hash_ids": [1, 2, 4, 5]}
{"timestamp": 9500, "input_length": 2300, "output_length": 40, "hash_ids": [1, 2, 4, 6, 7]}
"""
)
_ = (folder / "azure.csv").write_text("""TIMESTAMP,ContextTokens,GeneratedTokens
2026-01-05 09:00:00.0,1400,20
2026-01-05 09:00:00.4,3100,12
2026-01-05 09:00:31.0,900,45
""")

# %%
rows = []
for file, form in (("mooncake.jsonl", "mooncake"), ("azure.csv", "azure")):
    trace = traces.read(str(folder / file), form)
    replayed = turns.table(turns.play(roomy, step_time, Load(trace)))
    hits = replayed["hit_tokens"].sum() / replayed["input_len"].sum()
    wait = (replayed["first_s"] - replayed["arrival_s"]).max()
    rows.append({"file": file, "calls": len(replayed), "prompt tokens": int(replayed["input_len"].sum())}
                | {"found cached": f"{hits:.0%}", "longest TTFT ms": wait * 1e3, "provenance": "modelled"})  # fmt: skip
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** Mooncake's hash ids name blocks of 512 tokens, so common beginnings are known and the cache finds
# them; Azure's rows have lengths only.
# A whole trace goes through
#
#     kit simulate --model llama-3.1-8b --gpu h100-sxm-80gb --trace FILE --trace-format mooncake --replicas 8
#
# ## Where does the model break?
#
# All of the above assumes that a session returns to the replica that has its cache.
# Put four replicas behind a round-robin balancer, as the article does (F1), and that is no longer true.

# %%
quarter = replace(hour, duration_s=hour.duration_s and 900.0, sessions=hour.sessions and hour.sessions // 4)
four = {way: replace(cluster, replicas=4, routing=way) for way in ("session", "round-robin")}
spread = {way: turns.table(turns.play(one, step_time, quarter)) for way, one in four.items()}
share = {way: one["hit_tokens"].sum() / one["input_len"].sum() for way, one in spread.items()}
try:
    assert share["round-robin"] > 0.9 * share["session"], "round-robin loses the cache"
except AssertionError as broken:
    print(broken)
print("\n".join(f"{way:12} finds {found_share:.0%} of the prompt tokens cached" for way, found_share in share.items()))

# %% [markdown]
# Other limits.
# Sessions are independent and pauses do not depend on the server: people who wait too long leave, and these do not.
# Published traces have either agent sessions or real arrivals, never both, so a workload combines figures of
# several sources; each file in data/workloads says which and what is assumed.
# The hour starts with no session in it, so where sessions last longer than that their number is still growing at
# its end.
# Offloading KV to host memory is not modelled.
#
# ## Does the article hold?
#
# The verdict follows from the two numbers.

# %%
notebook.prose_table(article.rows("01"))

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: KV is kept for 30 s after each call. Which fraction of the prompt tokens is found?
# 2. Twiddle: the engine drops a session's KV at every pause (`keep_kv=False`). Which fraction does the cache find?
# 3. Frob: take the workload `deep-research` for an hour. How many sessions arrive? Then write a file of your own.

# %% tags=["exercise"]
found_30_s = None
# solution
found_30_s = turns.kept(played, 30)[0]

# %% tags=["exercise"]
found_dropped = None
# solution
dropped = turns.table(turns.play(replace(cluster, keep_kv=False), step_time, hour))
found_dropped = dropped["hit_tokens"].sum() / dropped["input_len"].sum()

# %% tags=["exercise"]
arriving = None
# solution
arriving = len(list(Load(workloads.load("deep-research"), duration_s=3600).stream()[0]))

# %% tags=["exercise"]
without = answers(turns.play(replace(cluster, keep_kv=False), step_time, hour), None, None, set())
research = list(workloads.generate(workloads.load("deep-research"), 0, duration_s=3600.0))
right = (turns.kept(played, 30)[0], without["prefix_hit_fraction"], len(research))
given = (found_30_s, found_dropped, arriving)
print("\n".join(notebook.check(*pair) for pair in zip(given, right, strict=True)))

# %% [markdown]
# ## Decision

# %%
knee = next((label for label, (hits, _) in ours.items() if hits >= 0.9 * ours["1 h"][0] > 0), None)
results = {
    "workload": name, "pattern": number, "arrivals": kind, "counts": counts, "sessions": len(sessions),
    "peak_calls_per_minute": turns.peak_calls(played["arrival_s"]), "refused": found["refused"],
    **{f"{state}_sessions_max": number for state, number in at_once.items()},
    "prefix_cached_after_pause": found["prefix_still_cached"], "prefix_hit_fraction": found["prefix_hit_fraction"],
    "burst": {"requests": count, "slo_ttft_s": limit_s} | {f"largest_passing_{what}": n for what, n in passing.items()},
    "burst_drain_s": drains["cold"][0], "idle_to_active_kv": found["sessions"]["idle_to_active_kv"],
    "retained_kv_tokens": {"mean": float(idle.mean()), "max": idle_peak}, "keep_kv_s": keeps.get(knee),
    "retained_kv_bytes_max": idle_peak * memory.kv_bytes_per_token, "warnings": warnings,
}  # fmt: skip

# %% tags=["nbval-check-output"]
shares = [row["cached_fraction"] for row in found["prefix_still_cached"][:4] if row["turns"]]
survives = f"at least {min(shares):.0%} of turns" if shares else "there are no pauses"
lines = [
    f"{case.title}: pattern {number}, workload {name}.",
    f"Arrivals: {kind}, counted in {counts}; busiest minute {results['peak_calls_per_minute']:,} calls.",
    "At once at most {active:,} active, {paused:,} paused, {queued:,} queued".format(**at_once) + f", on {hardware}.",
    f"Prefix cached after a pause of at most 5 minutes: {survives}.",
    f"KV of all paused sessions at the peak: {idle_peak / pool_tokens:.0%} of the pool; keep it {knee or 'no time'}.",
    f"{count:,} first calls at once, cold: last first token after {drains['cold'][0]:.2g} s; {passing['cold']:,} pass.",
]
run.finish(results, lines)

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - drew agent sessions from a file and saw how they arrive, grow, pause and fan out,
# - weighed keeping a paused session's KV against computing it again, in a cache without limits and in the engine's,
# - let a burst drain, and settled arrivals, session model and compute pattern for the notebooks to come.
#
# Next: [02 · Size the VRAM](02_size_vram.ipynb) turns active and paused sessions into GPUs.
#
# **Test configuration.** No hardware. Engine and flags of notebook 00, `--max-model-len` at the scenario's longest
# context (the model's own for workloads that are not the scenario's); the scheduler of `kit/scheduler` in virtual
# time, sessions routed to the replica that has their cache; seed 0; one hour, or one burst.
# Workloads with their sources: `data/workloads`.
# How the simulator works and what it leaves out: docs/structure.md.
# Words and formulas: docs/glossary.md.
