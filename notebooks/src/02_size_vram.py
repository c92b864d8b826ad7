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
# # 02 · Size the VRAM
#
# What fits, and how many sessions?

# %% [markdown]
# **At a glance.**
#
# - You will learn to predict an engine's start-up log, to count sessions from it, and which flag moves which line.
# - Input: the scenario of notebook 00; here also `gpu_count` and `headroom_fraction`.
# - Output: `results.json` with GPU count, tensor and pipeline parallelism, engine flags, and sessions with an interval.
# - Runtime: seconds, no GPU. Every number is modelled from the engine's own rule or quoted; none is measured.
# - Read first: [00 · Start here](00_start_here.ipynb).

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
gpu_count: int = 0  # GPUs of one replica; 0 takes the scenario's
headroom_fraction: float = 0.0  # of the KV pool, left free
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

from matplotlib import pyplot as plt

from kit import article, catalog, notebook, plots
from kit import scenario as scenarios
from kit.decision import decide, sentences
from kit.engine_config import EngineConfig
from kit.errors import UserError
from kit.memory import plan, sessions
from kit.units import GIB

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("02_size_vram", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
config = case.config(run.model, gpu_count=gpu_count or case.gpu_count, **flags)
demand = case.demand(headroom_fraction)
decision = decide(case, run.model, run.gpu, config, demand)
print("\n".join(sentences(case, demand, decision)))
if earlier := run.earlier("00_start_here"):
    print("\n00 said:", earlier["decision"][1])

# %% [markdown]
# "Asked" is the scenario's number of GPUs, "recommended" the fewest of this card that hold every session at its
# longest context at the same precision.
#
# **Predict** before you read on: of the memory that the card reports, how much is left for sessions?
# The article's answer is the card minus weights plus 15 %.
#
# ## Where does the memory go?
#
# An engine decides once, at start.
# It loads the weights, runs one batch as large as its limits allow, looks at the highest allocation, and gives
# what is left of its share to the KV pool.
# Each line below is a line of that start-up log.

# %%
held = scenarios.hold(run.model, run.gpu, config, demand)
memory = held.memory
terms = {
    f"{memory.config.gpu_memory_utilization:g} x reported memory": memory.budget,
    "- weights": memory.weights,
    "- activation peak": memory.activation,
    "- outside PyTorch": memory.non_torch,
    "- CUDA graphs" if memory.graphs_charged else "(CUDA graphs, not charged)": memory.cuda_graph,
    "= KV pool": memory.pool,
}
sizes = {name: (term.size_bytes / GIB, term.half_width_bytes / GIB) for name, term in terms.items()}
rows = [{"line": name, "GiB": size, "± 90 %": half} for name, (size, half) in sizes.items()]
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))

# %%
thumb = run.gpu.memory_bytes / GIB - 1.15 * memory.weights.size_bytes / GIB
pool = memory.pool.size_bytes / GIB
print(f"article's rule  {thumb:6.1f} GiB for KV cache  (quoted rule)")
print(f"engine's rule   {pool:6.1f} GiB  (modelled)")
print(f"the rule of thumb is off by {thumb - pool:+.1f} GiB a GPU")

# %%
cards = dict.fromkeys([*case.gpus, run.gpu.key])
compared = [scenarios.hold(run.model, catalog.gpu(key), config, demand) for key in cards]
plots.memory_by_gpu(compared)
plt.show()

# %% [markdown]
# **Reading it.** The pool is a remainder: weights are fixed, the share follows the card, and the activation peak
# follows two flags, `--max-num-seqs` and `--max-num-batched-tokens`, whose defaults are larger on cards from 70
# GiB up.
# No percentage of the weights says that.
# A negative pool means that the engine stops at start. docs/accuracy.md compares this rule with published
# start-up logs, and names its worst rows.
#
# ## What does a token of context cost?
#
# For every token a layer keeps one key and one value per KV head.
# In 16 bits that is this line:


# %% tags=["lesson"]
def kv_bytes_per_token(num_hidden_layers, num_key_value_heads, head_dim, dtype_bytes=2):
    """Bytes of KV cache that one token takes: a key and a value in every layer."""
    return 2 * num_hidden_layers * num_key_value_heads * head_dim * dtype_bytes


# %%
mistral = catalog.model("mistral-7b-v0.3")
by_hand = kv_bytes_per_token(mistral.num_hidden_layers, mistral.num_key_value_heads, mistral.head_dim)
assert by_hand == mistral.kv_bytes_per_token()
print(f"{mistral.key}: {by_hand:,} bytes a token")

# %% [markdown]
# Other kinds of attention keep less.
# Grouped queries (GQA) share KV heads, MLA keeps one compressed vector, sliding windows forget, and state-space
# layers keep a state of fixed size.
# So a session is not always tokens times a constant:

# %%
h200 = catalog.gpu("h200-sxm-141gb")
kinds = {"MHA": "llama-2-7b", "GQA": "mistral-7b-v0.3", "MLA": "deepseek-v2-lite"}
kinds |= {"sliding + full": "gemma-3-27b", "state + full": "qwen3.5-4b"}
plans = {kind: plan(catalog.model(key), h200, EngineConfig()) for kind, key in kinds.items()}
megabytes = {f"MB at {n // 1024}K": n for n in (4096, 32768)}
rows = [
    {"attention": kind, "model": kinds[kind], "bytes/token": round(one.kv_bytes_per_token)}
    | {name: one.kv_cache_bytes / one.concurrency(n) / 1e6 for name, n in megabytes.items()}
    for kind, one in plans.items()
]
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))

# %% [markdown]
# **Reading it.** An older 7B model with a KV head per query head costs four times one with eight shared heads.
# Where layers slide or keep a state, eight times the context costs less than eight times the memory.
# Short sessions of such hybrids can cost more than tokens times bytes, because engines pad their layers to pages of
# one size.
#
# ## How many sessions at which context?

# %%
plots.sessions_by_context(compared, asked=(demand.context_tokens, demand.sessions))
plt.show()

# %% [markdown]
# **Reading it.** Doubling the context halves the sessions.
# The cross is what the scenario asks for: a card holds it if its line passes above.
# Below the dotted line the card does not hold even one session of that length.
#
# ## What does a conversation grow to, and what do pauses cost?
#
# A turn re-sends everything before it (article A6), so a session must be sized at its last turn.
# Between turns the agent waits for a tool or a person (article A5). vLLM does not pin a paused session's blocks:
# they stay as prefix cache until others need the room.

# %%
best = scenarios.smallest_count(run.model, run.gpu, config, demand) or held
grown = {turn: case.growth_tokens[turn - 1] for turn in sorted({1, (case.turns + 1) // 2, case.turns})}
per_token = best.memory.kv_bytes_per_token
rows = [
    {"turn": turn, "context": n, "MB of KV": n * per_token / 1e6, "sessions": int(best.memory.concurrency(n))}
    for turn, n in grown.items()
]
print(f"{best.memory.config.gpu_count}x {run.gpu.key}, sessions that the pool holds at that turn")
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))

# %%
flops_per_s = best.memory.config.gpu_count * run.gpu.flops_per_s("bf16")
again_s = 2 * run.model.active_parameters * demand.context_tokens / flops_per_s
waiting = (0, demand.sessions // 2, demand.sessions, 4 * demand.sessions)
asked = [replace(demand, paused_sessions=count) for count in waiting]
active = [sessions.answer(best.memory, one).max_concurrent_sessions for one in asked]
rows = [{"paused, kept": n, "active beside them": left} for n, left in zip(waiting, active, strict=True)]
print(notebook.table([row | {"provenance": "modelled"} for row in rows]))
print(f"\nA pause that loses its cache: {again_s:.2f} s of prefill at least (modelled: a datasheet bound)")

# %% [markdown]
# **Reading it.** Keeping every paused session costs active ones one for one.
# Losing a cache costs the next turn its prefill again.
# Which is better depends on how long tools take: notebook 01 measures that, and offloading to host memory is the
# way between.
#
# ## What does --max-num-seqs do to the pool?
#
# The article calls `--max-num-seqs` the primary lever on VRAM (F5).
# It caps how many requests run in one batch.
# What it takes from the pool depends on the version: rows of the sampler in the profiling run, and since vLLM 0.21
# the captured CUDA graphs.

# %%
count = best.memory.config.gpu_count
vllm = scenarios.parallel(run.model, replace(config, engine="vllm", gpu_count=count))
plots.pool_by_max_num_seqs(run.model, run.gpu, vllm, ("0.16.0", "0.32.0"))
plt.show()

# %% [markdown]
# **Reading it.** The curve is drawn for the recommended number of GPUs, per GPU.
# What the lever costs changes with the engine's version: in older ones a large value takes whole GiB, in newer ones
# little.
# It does not reserve a slot of KV cache per sequence.
# Set it for latency (notebook 05) and let the pool decide the sessions.
#
# ## What do fewer bits bring?

# %%
formats = [("bf16", "auto"), ("bf16", "fp8"), ("fp8", "auto"), ("fp8", "fp8"), ("int4-awq", "fp8")]
changed = [replace(config, quantization=bits, kv_cache_dtype=kv) for bits, kv in formats]
labels = [{"weights": bits, "KV cache": kv.replace("auto", "16 bits")} for bits, kv in formats]
found = [scenarios.hold_row(run.model, run.gpu, one, demand) for one in changed]
rows = [label | one for label, one in zip(labels, found, strict=True)]
columns = ("weights", "KV cache", "fits", "sessions", "interval", "kv_pool_gib", "provenance")
print(notebook.table(rows, {key: scenarios.HEADINGS.get(key, key) for key in columns}))

# %% [markdown]
# **Reading it.** With many sessions the KV cache's bits count for more than the weights' bits: an 8-bit cache
# doubles the sessions at once.
# Both change answers; run your own evaluation before you take them.
#
# ## Which tensor parallelism can run?
#
# Tensor parallelism (TP) splits each layer over GPUs, so it must divide the attention heads.
# Pipeline parallelism (PP) gives each GPU some of the layers.
# The article offers three H200 for a 70B model (C6):

# %%
big = catalog.model("llama-3.1-70b")
try:
    plan(big, h200, EngineConfig(gpu_count=3, tensor_parallel_size=3))
except UserError as refusal:
    print("refused:\n" + str(refusal).replace("; ", "\n"))

# %%
ten = sessions.Demand(context_tokens=32_768, sessions=10)
tried = [EngineConfig(gpu_count=count, max_model_len=32_768) for count in (1, 2, 3, 4)]
rows = [scenarios.hold_row(big, h200, one, ten) for one in tried]
print("10 sessions of 32K tokens, llama-3.1-70b in 16 bits")
print(notebook.table(rows, scenarios.HEADINGS))

# %% [markdown]
# **Reading it.** A zero means that the weights alone exceed the engine's share of the card: that is article B4, a
# 70B model in 16 bits on one H200.
# With TP the GPUs share the work of every token; a pipeline passes each token from GPU to GPU, so it holds sessions
# but answers one of them no faster.
#
# ## Can several models share a GPU?
#
# The article's second pattern is an orchestrator (7B), a coder (13B) and a reviewer (7B).
# Each is an engine of its own with its own `--gpu-memory-utilization`.
# A second engine at the default share cannot start: the first one has taken most of the card.

# %%
team = scenarios.load("multi-agent")
variants = {"defaults": EngineConfig(), "--max-num-seqs 16": EngineConfig(max_num_seqs=16)}
variants["16 and INT4"] = EngineConfig(max_num_seqs=16, quantization="int4-awq")
rows = [
    {"flags": name} | scenarios.pack_row(team, catalog.gpu(key), one)
    for key in ("l40s-48gb", "h100-pcie-80gb")
    for name, one in variants.items()
]
columns = ("gpu", "flags", "shares", "GiB left", "fits", "sessions", "provenance")
print(notebook.table(rows, {key: scenarios.HEADINGS.get(key, key) for key in columns}))
first = plan(catalog.model(team.model), catalog.gpu("h100-pcie-80gb"), EngineConfig())
left = (first.gpu.memory_bytes - first.budget.size_bytes) / GIB
wanted = first.budget.size_bytes / GIB
print(f"\nOn an H100 PCIe one engine at its default leaves {left:.1f} GiB; a second one wants {wanted:.1f}.")

# %% [markdown]
# **Reading it.** Where the first line of a card is negative and the second is not, the default batch limits stand in
# the way, not the models: each engine reserves memory for a batch that it will never see.
# Shares are printed to three digits because that is what you pass.
#
# The article says that models cannot take turns on a GPU. vLLM's sleep mode is the counter-case: a sleeping
# engine moves its weights to host memory and drops its cache, and its authors report waking 18 to 200 times
# faster than a reload (quoted: vLLM blog, 2025-10-26).
# It suits a job in stages.
# Agents whose turns alternate would lose their cache at every switch.
#
# ## What about reasoning models?
#
# Their answers are long (ServeGen's deepseek-r1 clients: 792 tokens at the median, 12,607 at p99), and the cache
# grows while they are written.
# When the pool is full, vLLM preempts a request and computes it again later.
# It does not spill to host memory by itself (quoted: vLLM's optimization guide).

# %%
alone = sessions.Demand(context_tokens=32_768)
rows = []
for key, bits in (("llama-3.1-70b", "bf16"), ("llama-3.1-70b", "fp8"), ("deepseek-v3", "fp8")):
    spec, asked = catalog.model(key), EngineConfig(quantization=bits, max_model_len=32_768)
    fewest = scenarios.smallest_count(spec, h200, asked, alone)
    needed = {"model": key, "weights": bits, "H200 needed": fewest.memory.config.gpu_count}
    rows.append(needed | scenarios.hold_row(spec, h200, asked, alone))
columns = ("model", "weights", "sessions", "limited_by", "H200 needed", "provenance")
print(notebook.table(rows, {key: scenarios.HEADINGS.get(key, key) for key in columns}))
print("\nSessions of 32K tokens on one H200. DeepSeek R1 has the shape of deepseek-v3.")

# %% [markdown]
# ## How long until a replica is ready?
#
# Reading the weights is the part that the article counts (A4).
# Compiling, warming up, fetching the image and getting a machine come on top.

# %%
from kit.memory import startup

weights_bytes = 2 * catalog.model("codellama-13b").parameters
starts = [startup.start_up(weights_bytes, name) for name in startup.storages()]
rows = [
    {"13B in 16 bits from": one.storage, "weights s": one.weights_s}
    | {"ready on a running host s": "{:.0f} to {:.0f}".format(*one.total_s(warm_host=True))}
    | {"on a new one s": "{:.0f} to {:.0f}".format(*one.total_s()), "provenance": "modelled"}
    for one in starts
]
print(notebook.table(rows))

# %% [markdown]
# **Reading it.** Speeds and phases are quoted (data/startup.yaml); the sums are modelled.
# A burst that is over in a minute is over before any new machine is ready, whatever its disk.
#
# ## Does a start-up log agree?
#
# `kit size --log FILE` compares a log line by line.
# The log below is **synthetic**: we wrote it from a known configuration, with `--max-num-seqs 512` that the log
# does not show, and hold it against the defaults.
# It shows the tool, and proves nothing about the model.

# %%
import tempfile
from pathlib import Path

h100, llama = catalog.gpu("h100-sxm-80gb"), catalog.model("llama-3.1-8b")
known = plan(llama, h100, EngineConfig(engine_version="0.19.0", max_num_seqs=512))
text = f"""vLLM API server version 0.19.0
Model loading took {known.weights.size_bytes / GIB:.2f} GiB
PyTorch activation peak memory takes {known.activation.size_bytes / GIB:.2f} GiB
Available KV cache memory: {known.pool.size_bytes / GIB:.2f} GiB
GPU KV cache size: {known.kv_cache_tokens():,} tokens"""
log = Path(tempfile.mkdtemp()) / "startup.log"
log.write_text(text)
print(text)

# %%
from kit.memory import startlog

logged_engine, values = startlog.read_log(log)
assumed = startlog.config_from_log(EngineConfig(), logged_engine, values)
lines = list(startlog.compare(plan(llama, h100, assumed), values, assumed))
rows = [{"log line": one.line, "logged": one.measured, "predicted": one.predicted, "why": one.reason} for one in lines]
notebook.prose_table(rows)

# %% [markdown]
# **Reading it.** The weights agree, the activation peak does not, and the reason names the flag that explains it.
# With your own log the column "logged" is measured.
#
# ## Where does the model break?
#
# It assumes a card with nothing else on it.
# Say a desktop or a second process holds 12 GiB.
# The prediction does not change, but the engine compares its share with what is free and stops.

# %%
other_bytes = 12 * GIB
free_bytes = run.gpu.memory_bytes - other_bytes
try:
    assert memory.budget.size_bytes <= free_bytes, "the engine would stop at start"
except AssertionError as broken:
    print(f"{broken}: it wants {memory.budget.size_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free")
    print(f"largest --gpu-memory-utilization that starts: {free_bytes / run.gpu.memory_bytes:.2f}")

# %% [markdown]
# Other limits: a model with LoRA adapters, a draft model or images larger than the profiled ones takes more than
# is predicted, and so do other builds of the engine.
# The log tells; compare it.
#
# ## Does the article hold?
#
# The verdict follows from the two numbers: *holds with a condition* means that only the number under the
# condition named in the last column agrees.
# GB are decimal, as in the article; "about" is within a tenth.

# %%
notebook.prose_table(article.rows("02"))

# %% [markdown]
# Where the article contradicts itself:

# %%
notebook.prose_table(article.table("contradictions", "02"))

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: leave 20 % of the pool free. How many sessions does the asked number of GPUs hold?
# 2. Twiddle: keep as many paused sessions as active ones. How many active ones fit on the recommended GPUs?
# 3. Frob: put `llama-2-13b` in the place of the scenario's model. How many times the KV cache per token does it take?

# %% tags=["exercise"]
with_headroom = None
# solution
with_headroom = sessions.answer(memory, replace(demand, headroom_fraction=0.2)).max_concurrent_sessions

# %% tags=["exercise"]
beside_paused = None
# solution
kept = replace(demand, paused_sessions=demand.sessions)
beside_paused = sessions.answer(best.memory, kept).max_concurrent_sessions

# %% tags=["exercise"]
times_the_cache = None
# solution
times_the_cache = catalog.model("llama-2-13b").kv_bytes_per_token() / run.model.kv_bytes_per_token()

# %% tags=["exercise"]
left_free = replace(demand, headroom_fraction=0.2)
both = replace(demand, paused_sessions=demand.sessions)
expected = [sessions.answer(memory, left_free), sessions.answer(best.memory, both)]
numbers = [one.max_concurrent_sessions for one in expected]
mha_bytes = catalog.model("llama-2-13b").kv_bytes_per_token()
numbers.append(mha_bytes / run.model.kv_bytes_per_token())
given = (with_headroom, beside_paused, times_the_cache)
print("\n".join(notebook.check(*pair) for pair in zip(given, numbers, strict=True)))

# %% [markdown]
# ## Decision

# %% tags=["nbval-check-output"]
run.finish(decision, sentences(case, demand, decision))

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - predicted an engine's start-up memory line by line and counted sessions from the pool,
# - saw what context, pauses, bits, parallelism, batch limits and several models do to it,
# - held the article's sizing advice against computed numbers, and settled GPU count, flags and sessions.
#
# Next: latency (notebook 03).
# What fits may still be too slow.
#
# **Test configuration.** No hardware. vLLM at the newest version of `data/engines/vllm.yaml` unless a cell names
# another, default flags but `--max-model-len` at the scenario's longest context; models from `data/models`, GPUs
# from `data/gpus.yaml`, figures of the article from `data/article.yaml`, storage and start-up phases from
# `data/startup.yaml`.
# Accuracy against published logs: docs/accuracy.md.
# Words and formulas: docs/glossary.md.
