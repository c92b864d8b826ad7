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
# # 09 · Watch
#
# What do I look at, and what wakes me?

# %% [markdown]
# **At a glance.**
#
# - You will learn why a full VRAM says nothing about load, what to scale on instead, and how long an alert takes.
# - Input: the scenario of notebook 00, the GPU and flags of 02, the bundle of 08.
# - Output: `results.json` with the scale signals, their thresholds, and the alerts that fired.
# - Runtime: below 40 s. No GPU by default: emulators stand behind the bundle's NGINX and a real Prometheus evaluates
#   the bundle's rules. Where NGINX or Prometheus is not installed, the metrics page is read by the notebook itself.
#   With `source` live and a `base_url` it reads that server's page, and what it shows of the VRAM stays modelled.
# - Read first: [04 · Load test](04_load_test.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
calm_streams: int = 8  # streams of the calm phase
crowd_streams: int = 48  # streams of the crowd
calm_s: float = 4.0  # how long the calm lasts
crowd_s: float = 8.0  # how long the crowd stays
faster: float = 60.0  # the rules' clock: an alert that waits for two minutes waits for two seconds
source: str = "emulator"  # emulator or live
base_url: str = ""  # OpenAI-compatible server, live only
api_key_env: str = ""  # environment variable that holds its key, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

import numpy as np
from matplotlib import pyplot as plt

from kit import article, memory, notebook, plots
from kit import scenario as scenarios
from kit.catalog.paths import DATA, load_yaml
from kit.decision import decide
from kit.deploy import Source
from kit.deploy.scene import SCALE, scene
from kit.deploy.watch import panels
from kit.errors import UserError

# %%
from kit.loadgen import Options, fixed_sessions, level
from kit.loadgen import measure as load
from kit.memory.packing import pack
from kit.memory.sessions import Demand
from kit.units import gib

# %% tags=["nbval-ignore-output"]
if source == "recorded":
    raise UserError("source 'recorded': a recorded run has no metrics page to watch; choices: emulator, live")
case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("09_watch", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# Two replicas of the engine are watched: empty, calm, crowded, and empty again.
# First, what they take of the GPU before anyone asks anything.

# %%
config = case.config(run.model, gpu_count=case.gpu_count, engine=engine, quantization=quantization)
sized = run.earlier("02_size_vram") or {"results": decide(case, run.model, run.gpu, config, case.demand())}
best = sized["results"]["recommended"] or sized["results"]["replicas"] or {"gpu_count": 8}
config = scenarios.parallel(run.model, replace(config, gpu_count=best["gpu_count"]))
started = memory.plan(run.model, run.gpu, config)
vram = started.budget.size_bytes / run.gpu.memory_bytes

# %% [markdown]
# For this notebook each replica gets a smaller share of the GPU: room for twelve requests of 1,024 tokens.
# So the KV cache fills within seconds, and the picture is the same as after minutes on the whole card.

# %%
held, length = 12, 1024
room = Demand(length, held)
(share,) = pack(run.gpu, [(run.model, replace(config, max_model_len=length), room)]).shares
small = replace(config, max_model_len=length, gpu_memory_utilization=min(0.98, share.gpu_memory_utilization))

# %%
case = case.model_copy(update={"model": names["model"]})
watched = scene(Source(case, gpu, engine), small, 2, faster, base_url, api_key_env)
provenance = "modelled" if watched.emulated else "measured"
print(f"Watched: {watched.how} ({provenance})")

# %%
ask, quiet = fixed_sessions(900, 120), Options(log=lambda line: None)
calm = level("concurrency", calm_streams, ask, duration_s=calm_s)
crowd = level("concurrency", crowd_streams, ask, duration_s=crowd_s)

# %%
times = {"empty": watched.now()}
for name, one in {"calm": calm, "crowd": crowd}.items():
    times[name] = watched.now()
    load(watched.target, [one], quiet)
times["empty again"] = watched.now()

# %%
alerts, until = watched.alerts(), times["empty again"] + 10
while watched.now() < until and any(one["until_s"] > watched.now() - 1 for one in alerts if one["alert"] in SCALE):
    alerts = watched.alerts()
looked_at = watched.now()

# %%
signals = {name: watched.panel({name: query})[name] for name, (query, _, _) in SCALE.items()}
limits = load_yaml(DATA / "watch.yaml")["thresholds"]

# %%
waiting, usage = (signals[name] for name in ("QueueBacklog", "KVCachePressure"))
begins = [*times.values(), watched.now()]
phases = {}
for place, name in enumerate(times):
    begin, end = begins[place : place + 2]
    phases[name] = {
        what: max((y for x, y in zip(*curve, strict=True) if begin <= x < end), default=0.0)
        for what, curve in (("waiting", waiting), ("kv", usage))
    }

# %%
rows = [
    {"phase": name, "VRAM in use": f"{vram:.0%}", "KV cache in use, most": f"{one['kv']:.0%}"}
    | {"waiting per replica, most": one["waiting"], "provenance": provenance}
    for name, one in phases.items()
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** VRAM is the engine's share of the card: it takes it at start and gives nothing back.
# An alert on VRAM above 80 % would have fired in every row, the first one included.
# The other two columns follow the load.
#
# **Predict** before you read on: which of the two signals moves first when the crowd comes, and which one has a
# maximum that says how full it is?
#
# ## The signal that misleads

# %%
span = [0.0, begins[-1]]
curves = {"VRAM in use": (span, [100 * vram] * 2)}
curves["KV cache in use"] = (usage[0], [100 * one for one in usage[1]])
axes = {"xlabel": "Time (s)", "ylabel": "Share (%)"}

# %%
finding = f"VRAM stands at {vram:.0%} from the first second; the KV cache goes from 0 to {max(usage[1]):.0%}"
plots.lines_over(curves, finding, watched.how, **axes)
plt.axhline(80, color="#1f2429", linewidth=0.9, linestyle=":")
plt.ylim(0, 112)
for name, at in list(times.items())[1:]:
    plt.axvline(at, color="#c7ccd1", linewidth=0.8)
    plt.text(at + 0.2, 104, name, fontsize=9)
plt.show()

# %% [markdown]
# **Reading it.** The dotted line is the article's 80 %.
# The flat line is above it whether anyone asks or not; the other one crosses it when the crowd comes and comes back.
# To see the share of the KV cache `nvidia-smi` is of no use: only the engine's metrics page has it.
#
# ## What to scale on

# %%
axes = {"xlabel": "Time (s)", "ylabel": "Requests"}
finding = f"Up to {max(waiting[1]):.0f} requests wait for each replica; the limit is {limits['waiting_per_replica']}"
plots.lines_over({"waiting per replica": waiting}, finding, watched.how, **axes)
plt.axhline(limits["waiting_per_replica"], color="#1f2429", linewidth=0.9, linestyle=":")
for at in list(times.values())[1:]:
    plt.axvline(at, color="#c7ccd1", linewidth=0.8)
plt.show()

# %%
firing = {one["alert"]: one for one in alerts}
rows = []
for name, (_, limit, for_s) in SCALE.items():
    over = next((x for x, y in zip(*signals[name], strict=True) if y > limits[limit]), np.nan)
    later = firing[name]["from_s"] - over if name in firing else None
    rows.append({"alert": name, "fires above": limits[limit], "for s": for_s, "over it from s": over})
    rows[-1] |= {"fired s later": later, "on its own clock, s": later and later * faster, "provenance": provenance}

# %%
print(notebook.table(rows))
ended = [name for name, one in firing.items() if one["until_s"] < looked_at - 1]
print(f"\nFired: {', '.join(firing) or 'none'}; ended again: {', '.join(ended) or 'none'}")

# %% [markdown]
# **Reading it.** The queue speaks at once, and has no upper end; KV usage speaks a little later, and says how much is
# left.
# Either one alone can be blind: with a low `--max-num-seqs` requests wait beside an empty cache, and with long
# contexts the cache is full while nobody waits yet.
# So the bundle's autoscaler takes the larger of both.
#
# The rules' clock runs faster here, the load does not: what fires after two seconds here fires after two minutes in a
# bundle, if the crowd is still there.
#
# Both come too late for a burst of seconds: a new replica takes minutes to start (notebook 07).
# What is short is absorbed by the queue, or refused with 429.
#
# ## The dashboard's panels

# %%
_, shown = panels("agents")
unit = {"s": " (s)", "percentunit": " (share)"}
found = {one["title"] + unit.get(one["unit"], ""): watched.panel(one["lines"]) for one in shown}
drawn = {title: curves for title, curves in found.items() if curves}

# %%
_, grid = plt.subplots(-(-max(1, len(drawn)) // 2), 2, figsize=(10, 1.9 * (-(-max(1, len(drawn)) // 2))))
for axis, (title, curves) in zip(np.ravel(grid), drawn.items(), strict=False):
    for legend, (x, y) in curves.items():
        axis.plot(x, y, label=legend, linewidth=1.3)
    axis.set_title(title, fontsize=9)
    axis.set_xlim(span)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6.5, loc="lower right")
for axis in np.ravel(grid)[len(drawn) :]:
    axis.set_visible(False)
plt.show()

# %% [markdown]
# **Reading it.** These are the queries of the bundle's Grafana dashboard *Agents*, drawn here.
# Without a Prometheus only the two signals stand here; the others need its rates.
# They name recording rules such as `model:kv_cache_usage:avg`, not an engine's metrics: the same dashboard and alerts
# serve vLLM and SGLang, and `kit deploy check` says which names an engine version does not print.
#
# ## What wakes whom

# %%
severities = {
    "page": "wakes someone",
    "scale": "asks for a replica",
    "warn": "for working hours",
    "cost": "money is spent",
}

# %%
rows = [
    {"alert": one["alert"], "severity": one["severity"], "meaning": severities.get(one["severity"], "told")}
    | {"from s": one["from_s"], "until s": one["until_s"]}
    for one in alerts
]
print(notebook.table(rows) if rows else "No alert fired")

# %% [markdown]
# **Reading it.** The exact moments differ from run to run, and so may `KVCachePressure`: its few seconds above the
# limit are counted by the clock of a busy machine.
# `TTFTBudgetBurn` needs both a bad five minutes and a bad hour, so one bad moment wakes nobody.
# An alert about a GPU that is missing is right as well: no GPU exporter runs beside an emulator.
#
# ## Does the article hold?

# %%
numbers = {"vram": vram, "kv_empty": phases["empty"]["kv"], "kv_crowd": phases["crowd"]["kv"]}
notebook.prose_table(article.rows("09", numbers))

# %% [markdown]
# ## Where does it mislead all the same?
#
# - KV usage counts what running requests hold. Prefixes that wait in the cache for their session's next turn count as
#   free, so a pool at 60 % may already forget sessions: look at the prompt tokens found cached.
# - One replica that gets everything hides behind a mean: `LoadSkew` looks at the busiest one.
# - Waiting requests are zero where a client gives up first: `TruncatedStreams` counts those.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: above which KV usage would the alert have been silent in this run?
# 2. Twiddle: how many replicas would have brought the queue of the crowd to the limit, if they share it evenly?
# 3. Frob: let the crowd grow: `kit run --notebooks 09 --set crowd_streams=96 --set crowd_s=15`.

# %% tags=["exercise"]
silent_above = None
# solution
silent_above = max(usage[1])

# %% tags=["exercise"]
replicas_needed = None
# solution
replicas_needed = int(np.ceil(2 * max(waiting[1]) / limits["waiting_per_replica"]))

# %% tags=["exercise"]
right = (max(usage[1]), int(np.ceil(2 * max(waiting[1]) / limits["waiting_per_replica"])))
given = (silent_above, replicas_needed)
print("\n".join(notebook.check(*pair) for pair in zip(given, right, strict=True)))

# %% [markdown]
# ## Decision

# %%
yes = {True: "yes", False: "no"}
queue_limit, kv_limit = limits["waiting_per_replica"], limits["kv_cache_usage_limit"]
crossed = {name: (yes[one["waiting"] > queue_limit], yes[one["kv"] > kv_limit]) for name, one in phases.items()}
print(f"Waiting over the limit, if only for a moment: calm {crossed['calm'][0]}, crowd {crossed['crowd'][0]}")
print(f"KV cache over the limit, likewise: calm {crossed['calm'][1]}, crowd {crossed['crowd'][1]}")

# %% tags=["nbval-check-output"]
print(f"VRAM above 80 % while nobody asks: {yes[vram > 0.8]}")
print(f"Scale on: over {queue_limit} requests waiting per replica for 2 min, or KV cache over {kv_limit:.0%} for 5 min")
print(f"QueueBacklog fired: {yes['QueueBacklog' in firing]}")  # moments, and the other one, hang on this machine's pace

# %% tags=["nbval-ignore-output"]
watched.stop()
dashboards = [one["title"] for one in load_yaml(DATA / "watch.yaml")["dashboards"]]
results = {"scale_on": {name: {"above": limits[limit], "for_s": for_s} for name, (_, limit, for_s) in SCALE.items()}}
results |= {"dashboards": dashboards, "alerts": alerts, "phases": phases, "vram_fraction": vram, "how": watched.how}
results |= {"faster": faster, "provenance": provenance}
told = [
    f"Scale on {', '.join(SCALE)}; never on VRAM, which stands at {vram:.0%} of {gib(run.gpu.memory_bytes):.0f} GiB"
]
told.append(f"Dashboards: {', '.join(dashboards)}; alerts that fired here: {', '.join(firing) or 'none'}")
run.finish(results, told)

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - saw VRAM stand still while the load came and went,
# - scaled on waiting requests and KV usage, and saw their alerts fire and end,
# - drew the dashboard's own panels.
#
# Next: notebook 10 lets agents of three frameworks make the load.
#
# **Test configuration.** Two emulators of the engine at its newest version, each with a share of the GPU that holds
# twelve requests of 1,024 tokens; requests of 900 prompt and 120 answer tokens, each a session of its own.
# NGINX, rules and scrape targets are those of `kit deploy`; every duration of the rules is divided by `faster`, and no
# scrape is shorter than a quarter of a second.
# Every alert is tested three ways (fires, stays silent, ends) by `make test-deploy`.
