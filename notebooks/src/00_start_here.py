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
# # 00 · Start here
#
# What is the answer for my scenario, and what do I still have to find out?

# %% [markdown]
# **At a glance.**
#
# - You will learn which cards hold your agents' sessions, what limits them, and what memory alone cannot answer.
# - Input: a scenario file (model, sessions, context, limits). It is asked for here and nowhere else.
# - Output: `results.json` with the GPU, the count, the engine's flags, the sessions, and what is left to find out.
# - Runtime: seconds. No GPU and no server: every number here is modelled or quoted, none is measured.
# - Read first: nothing.

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = ""  # key in data/models, Hugging Face id or path; empty takes the scenario's
scenario: str = "customer-service"  # key in data/scenarios or a YAML file
engine: str = "vllm"  # vllm or sglang
quantization: str = ""  # of the weights; empty takes the scenario's
kv_cache_dtype: str = "auto"  # auto or fp8
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from kit import article, catalog, notebook
from kit import scenario as scenarios
from kit.decision import decide, sentences
from kit.errors import UserError

case = scenarios.load(scenario)
names = {"gpu": gpu, "model": model or case.model, "scenario": scenario}
run = notebook.begin("00_start_here", **names, source=source, output_dir=output_dir)

# %% [markdown]
# ## The answer first
#
# A session is one conversation of one agent.
# It fits if the engine's KV cache, the memory in which it keeps what it has read and written so far, holds it at
# its longest context beside all the others.

# %%
flags = {"engine": engine, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
config = case.config(run.model, gpu_count=case.gpu_count, **flags)
cards = dict.fromkeys([*case.gpus, run.gpu.key])
demand = case.demand()
rows = [scenarios.row(case, run.model, catalog.gpu(key), config, demand) for key in cards]
paused = f" and {case.paused_sessions} paused" if case.paused_sessions else ""
print(f"{case.title}: {run.model.key}, {case.context_tokens:,} tokens a session")
print(f"Asked for: {case.sessions} active{paused} sessions\n")
print(notebook.table(rows, {key: scenarios.HEADINGS[key] for key in rows[0]}))

# %% [markdown]
# **Reading it.** "Sessions" is how many active ones one replica holds, with a 90 % interval beside it.
# "Limited by" names what runs out first: `weights` (the model itself does not fit), `kv_cache` (no room for more
# sessions), `max_num_seqs` (the engine's cap on requests in one batch), or `max_model_len` (the context is longer
# than the model allows).
# How far such numbers can be trusted is written in docs/accuracy.md, against published start-up logs.
#
# **Predict** before you read on: if the card of this run does not hold your sessions, what is the cheapest change
# that helps?

# %%
decision = decide(case, run.model, run.gpu, config, demand)
lines = sentences(case, demand, decision)
print("\n".join(lines))

# %% [markdown]
# **Reading it.** "Asked" is the scenario's number of GPUs, "recommended" the fewest of this card that hold every
# session at its longest context at the same precision.
# The list of what would fit goes from the change that costs nothing to hire (fewer bits in the KV cache, fewer bits
# in the weights) to more GPUs of the same kind and larger ones.
# Fewer bits change the model's answers; test yours before you rely on them.
#
# ## What is different about agents?
#
# The article that this project answers ("How to Build GPU Infrastructure for AI Agents", Spheron blog, 2026-03)
# opens with a comparison of ordinary inference and agents.
# Its words are quoted in the first three columns; the fourth is computed here.

# %%
notebook.prose_table(article.table("opening", "00"))

# %% [markdown]
# ## Does the article hold?
#
# Each line has the article's figure, ours, and a verdict that follows from the two numbers.
# *Holds with a condition* means that only the number under the condition named in the last column agrees.
# All of ours are modelled, or bounds from datasheets; the figures are quoted.

# %%
notebook.prose_table(article.rows("00"))

# %% [markdown]
# **Reading it.** The 10,000 requests of A1 are a question of compute and queues, not of memory.
# A tool call (A5) does not pin memory on today's engines: the paused cache stays until another request needs the
# blocks, and then the next turn computes it again.
#
# Where the article contradicts itself, as far as this notebook reaches:

# %%
notebook.prose_table(article.table("contradictions", "00"))

# %% [markdown]
# ## Which of the four patterns is mine?
#
# The article names four compute patterns.
# Each has a file in data/scenarios; `kit run --scenario FILE` takes it through all notebooks.

# %%
notebook.prose_table(article.patterns())

# %% [markdown]
# ## What happens with a name that is not known?
#
# Nothing is guessed.
# A GPU, a model or a parameter that the data does not have stops the run with the nearest names.

# %%
try:
    catalog.gpu("h100-sxm-81gb")
except UserError as refusal:
    print(str(refusal)[:90], "..")

# %% [markdown]
# ## What do I still have to find out?
#
# Memory says what fits.
# It does not say how fast, at what price, or whether the arithmetic meets the engine you run.

# %%
notebook.prose_table(notebook.chapters())

# %% [markdown] tags=["exercise"]
# ## Exercises
#
# 1. Tweak: how many sessions does the card of this run hold with an fp8 KV cache?
# 2. Frob: use your own model. Copy `data/scenarios/customer-service.yaml`, change it, run `kit run --scenario FILE`.

# %% tags=["exercise"]
sessions_fp8 = None
# solution
narrow = case.config(run.model, gpu_count=case.gpu_count, **(flags | {"kv_cache_dtype": "fp8"}))
found = scenarios.hold(run.model, run.gpu, narrow, demand)
sessions_fp8 = found.answer.max_concurrent_sessions

# %% tags=["exercise"]
check = case.config(run.model, gpu_count=case.gpu_count, **(flags | {"kv_cache_dtype": "fp8"}))
right = scenarios.hold(run.model, run.gpu, check, demand).answer.max_concurrent_sessions
print(notebook.check(sessions_fp8, right))

# %% [markdown]
# ## Decision

# %% tags=["nbval-check-output"]
left = [one["question"] for one in notebook.chapters() if one["notebook"] != run.notebook]
told = "Still to find out: first tokens (03), the real engine (04), flags (05), price (07)."
run.finish(decision | {"to_find_out": left}, [*lines, told])

# %% [markdown]
# ## Recap
#
# In this notebook we
#
# - asked a scenario of a memory model of the engine and got the cards that hold it,
# - held the article's opening, its claims about agents and its four patterns against computed numbers,
# - listed what memory alone does not answer.
#
# Next: [02 · Size the VRAM](02_size_vram.ipynb) shows where the numbers come from and settles count, parallelism
# and flags.
#
# **Test configuration.** No hardware: a model of vLLM's (or SGLang's) start-up memory rule at its newest version
# known to `data/engines`, default flags but `--max-model-len` at the scenario's longest context; GPUs from
# `data/gpus.yaml`, models from `data/models`, the article's figures from `data/article.yaml`.
# Accuracy: docs/accuracy.md.
# Words and formulas: docs/glossary.md.
