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
# # 08 · Deploy
#
# What do I run?

# %% [markdown]
# **At a glance.**
#
# - You will learn what the four architectures share and where they differ, what each costs in memory, cache hits and
#   dollars, and what of a bundle is proven before a GPU is rented.
# - Input: the scenario; tuned flags and measured speed of notebooks 05 and 04, where they ran.
# - Output: a bundle in `bundle/` beside `results.json`: engines, NGINX, monitoring, a README and your `values.yaml`.
# - Runtime: seconds, no GPU. Sizes and speeds are modelled unless an earlier notebook measured them; prices are quoted.
# - Read first: [02 · Size the VRAM](02_size_vram.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm, sglang, tensorrt-llm, tgi or ollama
architecture: str = ""  # single-node, burst, tiered or multi-node; empty lets the sizes decide
source: str = "emulator"  # emulator, live or recorded
output_dir: str = ""  # empty means write no files

# %%
import tempfile
from collections import Counter
from pathlib import Path

from matplotlib import pyplot as plt

from kit import article, catalog, notebook, simulator
from kit import scenario as scenarios
from kit.deploy import ARCHITECTURES, Source, render
from kit.deploy.check import check
from kit.deploy.picture import draw
from kit.engine_config import EngineConfig
from kit.errors import UserError

# %% tags=["nbval-ignore-output"]
case = scenarios.load(scenario)
case = case.model_copy(update={"model": model or case.model})
run = notebook.begin("08_deploy", gpu=gpu, model=case.model, scenario=scenario, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# Each architecture is rendered for this scenario on this GPU. One that cannot start is refused, with the reason.

# %%
folder = Path(tempfile.mkdtemp())
asked = Source(case, gpu, engine, Path(output_dir).resolve().parents[1] if output_dir else None)
bundles, refused = {}, {}
for name in ARCHITECTURES:
    try:
        bundles[name] = render(asked, name, folder / name)
    except UserError as error:
        refused[name] = str(error)

# %%
rows = [
    {"architecture": name, "GPUs": ", ".join(f"{n} x {key}" for key, n in one["gpus"].items())}
    | {"sessions": one["sessions"], "asked": case.sessions, "USD/h (quoted)": one["usd_per_hour"]}
    for name, one in bundles.items()
]
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))
for name, reason in refused.items():
    print(f"\n{name} refused:\n  " + reason.replace("; ", "\n  "))

# %%
enough = [name for name in ("single-node", "multi-node") if name in bundles and not bundles[name]["warnings"]]
chosen = architecture or next(iter([*enough, *bundles]), "single-node")
if chosen not in bundles:
    raise UserError(f"architecture {chosen}: {refused.get(chosen, 'choices: ' + ', '.join(ARCHITECTURES))}")
bundle = bundles[chosen]
print(f"This run takes {chosen}: {ARCHITECTURES[chosen]['what']}")

# %% [markdown]
# Without a wish of yours the smallest architecture that holds every session at its longest context is taken.
# Burst and tiers are choices that notebook 07 prices: they trade attainment or quality for money.
#
# ## What does it look like?

# %%
draw(bundle)
plt.show()

# %%
parts = Counter(path.split("/")[0] for path in bundle["files"])
print("\n".join(f"{number:3} file(s)  {part}" for part, number in sorted(parts.items())))

# %% [markdown]
# `values.yaml` is the one file to edit. `kit deploy` into the same folder keeps it, uses it and rewrites the others.
# No key is in any of these files: `edge/secrets.sh` makes them into `secrets/`, and containers read them from there.
#
# ## Where do the architectures differ?

# %%
import yaml

kinds = {}
for name in set(bundles) - {"multi-node"}:
    services = yaml.safe_load((folder / name / "compose.yaml").read_text())["services"]
    kinds[name] = {key.rstrip("0123456789").rstrip("-") for key in services}
shared = set.intersection(*kinds.values()) if kinds else set()
print("All compose bundles:", ", ".join(sorted(shared)))
print("\n".join(f"{name} beside them: {', '.join(sorted(kinds[name] - shared))}" for name in sorted(kinds)))

# %%
rows = [
    {"architecture": name, "pool": key, "on": f"{one['gpu_count']} x {one['gpu']}", **bundles[name]["pools"][key]}
    | {"engines": one["replicas"], "provenance": one["provenance"]}
    for name in bundles
    for key, one in bundles[name]["values"]["pools"].items()
]
columns = ("architecture", "pool", "engines", "on", "sessions", "speed", "weight", "provenance")
print(
    notebook.table(
        rows, {key: {"sessions": "sessions each", "speed": "tokens/s each"}.get(key, key) for key in columns}
    )
)

# %% [markdown]
# **Reading it.** Within one pool of servers the weight follows the speed of each kind of machine, so that a fast one
# gets more sessions.
#
# ## When does one engine need more than a node?

# %%
rows = []
for key, bits in (("llama-3.1-70b", "bf16"), ("llama-3.1-405b", "fp8"), ("deepseek-v3", "fp8")):
    wanted = {"model": key, "quantization": bits, "sessions": 20, "context_tokens": 8192, "models": ()}
    big = Source(scenarios.load("api-cluster").model_copy(update=wanted), "h100-sxm-80gb")
    one = render(big, "multi-node", folder / "big" / key)["values"]["pools"]["main"]
    split = {"TP": one["flags"]["tensor_parallel_size"], "PP": one["flags"]["pipeline_parallel_size"]}
    rows.append({"model": key, "weights": bits, "H100 SXM of one engine": one["gpu_count"], **split})
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))

# %% [markdown]
# **Reading it.** Tensor parallelism exchanges activations twice in every layer, so it stays where NVLink is: inside a
# node. While one engine fits there, further nodes are further engines, each with all of the model (data parallel), and
# nothing crosses nodes but requests.
# Only a model that fits no node is cut into stages, one a node (pipeline parallel): one exchange a stage, for which
# InfiniBand pays. Tensor parallelism across nodes comes after that, over InfiniBand with GPUDirect only.
#
# ## Why do sessions stay on their engine?
#
# **Predict**: with four engines taken in turn, how much of its prompt does a turn find in the cache?

# %%
from kit.workload import load

workload, engines = load(case.workload or "customer-service"), 4
pool = next(iter(bundle["values"]["pools"].values()))
shape = scenarios.parallel(run.model, case.config(run.model, gpu_count=pool["gpu_count"]))
limits, steps, _ = simulator.replica(run.model, run.gpu, shape)

# %%
found = {}
for routing in ("round-robin", "least-loaded", "session"):
    cluster = simulator.SimulationConfig(limits, engines, routing, warm=True)
    found[routing] = simulator.study(cluster, steps, simulator.Load(workload, sessions=min(50, case.sessions)))

# %%
rows = [
    {
        "routing": name,
        "prompt tokens found": f"{one['prefix_hit_fraction'] or 0:.0%}",
        "TTFT p90 s": one["ttft_s"]["p90"],
    }
    | {"provenance": "modelled"}
    for name, one in found.items()
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** In turn, an engine sees a session again only by chance and computes the history anew.
# NGINX therefore hashes the session's header; a lost engine moves only its own sessions.
# A hash does not count: with 200 sessions on four engines the fullest holds about 1.15 times the mean, and in one of
# six draws more than 1.2 times.
# `edge.balance: sticky-round-robin` in `values.yaml` deals new sessions in turn and remembers them;
# `sticky-least-loaded` puts vllm-router behind NGINX, which counts.
#
# ## What do several engines on one GPU cost?

# %%
from kit.memory import plan

small, pcie = catalog.model("mistral-7b-v0.3"), catalog.gpu("h100-pcie-80gb")
rows = []
for count, share in ((1, 0.92), (2, 0.45), (3, 0.30)):
    memory = plan(small, pcie, EngineConfig(gpu_memory_utilization=share, max_model_len=4096))
    tokens = count * memory.kv_cache_tokens()
    rows.append({"engines": count, "share each": share, "KV tokens together": tokens, "4K sessions": tokens // 4096})
print("mistral-7b-v0.3 on one H100 PCIe")
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))

# %% [markdown]
# **Reading it.** Every further engine loads the weights again and reserves its own batch.
# One engine batches all sessions anyway; several pay only where they are different models.
#
# ## How long until a spot machine serves?

# %%
from kit.memory.startup import start_up

weights_bytes = plan(run.model, run.gpu, shape).weights.size_bytes * pool["gpu_count"]
rows = []
for storage in ("network-volume", "nvme-local"):
    start = start_up(weights_bytes, storage)
    rows.append({"weights from": storage, "weights s": start.weights_s, "ready from s": start.total_s()[0]})
    rows[-1] |= {"to s": start.total_s()[1], "provenance": "modelled"}
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** Machine, image, weights, compilation: a burst shorter than that is served by what is warm.
# Spheron bills at least 20 minutes of an instance, so a machine that came stays that long.
#
# ## Is it right?
#
# `kit deploy check` proves what this machine can: which programs are installed here decides how much.

# %% tags=["nbval-ignore-output"]
findings = check(folder / chosen)
print(
    notebook.table([{"status": status, "checks": n} for status, n in Counter(one.status for one in findings).items()])
)

# %% tags=["nbval-ignore-output"]
rest = [one for one in findings if one.status != "passed"]
notebook.prose_table(
    [{"status": one.status, "what": one.check, "needs": one.reason} for one in rest] or [{"all": "passed"}]
)

# %% [markdown]
# What is kept out of a bundle, and how that was tried: docs/security.md.
#
# ## Does the article hold?

# %%
sticky, in_turn = (found[name]["prefix_hit_fraction"] or 0.0 for name in ("session", "round-robin"))
numbers = {"engines": engines, "found_sticky": sticky, "found_in_turn": in_turn}
numbers["found_in_turn_over_sticky"] = in_turn / sticky if sticky else 1.0
usd = {name: one["usd_per_hour"] for name, one in bundles.items()}
alone, tiers = usd.get("single-node") or usd.get("multi-node"), usd.get("tiered")
numbers |= {"usd_tiers": tiers or 0.0, "usd_alone": alone or 0.0}
numbers["tiers_over_alone"] = tiers / alone if tiers and alone else float("nan")

# %%
numbers |= {name: bundle["values"]["limits"][name] for name in ("nofile", "somaxconn")}
notebook.prose_table(article.rows("08") + article.rows("08", numbers))

# %% [markdown]
# ## Where does the model break?
#
# Ask for a burst GPU that has no room, and the bundle is not written:

# %%
try:
    render(Source(scenarios.load("customer-service"), "h100-pcie-80gb"), "burst", folder / "no-room")
except UserError as refusal:
    print(str(refusal).replace("; ", "\n"))

# %% [markdown]
# Other limits: sessions are counted at their longest context, which few reach at once, so the number of engines is on
# the safe side; what a mixed load does to the first token is not in the sizing (notebook 04 measures it).
# No container of a bundle has been started by this project, and no image pulled.

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: how many engines does the bundle hold after `replicas: 3` in its `values.yaml`, rendered again?
# 2. Twiddle: which share of the prompt tokens does the routing `prefix` find?
# 3. Frob: `kit deploy --scenario voice-agent --architecture burst --target dstack --out DIR`, and read the `target`.

# %% tags=["exercise"]
engines_after = None
# solution
changed = yaml.safe_load((folder / chosen / "values.yaml").read_text())
first = next(iter(changed["pools"]))
changed["pools"][first]["replicas"] = 3
(folder / chosen / "values.yaml").write_text(yaml.safe_dump(changed))
again = render(asked, chosen, folder / chosen)
engines_after = again["values"]["pools"][first]["replicas"]

# %% tags=["exercise"]
found_by_prefix = None
# solution
by_prefix = simulator.SimulationConfig(limits, engines, "prefix", warm=True)
load_again = simulator.Load(workload, sessions=min(50, case.sessions))
found_by_prefix = simulator.study(by_prefix, steps, load_again)["prefix_hit_fraction"]

# %% tags=["exercise"]
by_prefix = simulator.SimulationConfig(limits, engines, "prefix", warm=True)
load_again = simulator.Load(workload, sessions=min(50, case.sessions))
right = (3, simulator.study(by_prefix, steps, load_again)["prefix_hit_fraction"])
print("\n".join(notebook.check(*pair) for pair in zip((engines_after, found_by_prefix), right, strict=True)))

# %% [markdown]
# ## Decision

# %% tags=["nbval-check-output"]
final = render(asked, chosen, Path(output_dir) / "bundle" if output_dir else folder / "decision")
told = [f"Bundle: {chosen} for {final['target']}, {len(final['files'])} files"]
for name, one in final["values"]["pools"].items():
    on = f"{one['replicas']} x {one['engine']} {one['engine_version']} on {one['gpu_count']} x {one['gpu']}"
    told.append(f"{name}: {on}, max_num_seqs {one['flags']['max_num_seqs']} ({one['provenance']})")
told += [*(f"Note: {line}" for line in final["warnings"]), f"Refused: {', '.join(refused) or 'none'}"]
print("\n".join(told))

# %% tags=["nbval-ignore-output"]
kept = ("architecture", "target", "pools", "values", "usd_per_hour", "gpus", "sessions", "warnings")
results = {name: final[name] for name in kept} | {"bundle": "bundle" if output_dir else None, "refused": refused}
run.finish(results | {"checks": dict(Counter(one.status for one in findings))}, told)

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - rendered four architectures from one scenario, with weights by speed and flags by the limits,
# - saw what routing, several engines on a GPU and a cold start cost,
# - checked the bundle, and wrote the one to run.
#
# Next: notebook 09 loads it and watches.
#
# **Test configuration.** No hardware, no containers: templates of `docker/templates`, images and defaults of
# `data/deploy.yaml`, sizes by `kit/memory`, speeds by `kit/steptime`, prices by `data/prices.yaml`, sessions drawn from
# the scenario's workload with seed 0. Four more bundles are in `docker/`. Words and formulas: docs/glossary.md.
