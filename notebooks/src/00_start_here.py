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
# How much memory does this GPU leave for the sessions of my agents?

# %% [markdown]
# **At a glance.**
# You will learn which number limits the sessions on a GPU.
# Output: `gpu_memory_bytes` in results.json.
# Runtime: seconds, no GPU needed.

# %% tags=["parameters"]
gpu: str = "h100-sxm-80gb"  # key in data/gpus.yaml
model: str = "llama-3.1-8b"  # key in data/models, Hugging Face id or path
scenario: str = ""  # scenario YAML file, empty for none
engine: str = "vllm"  # vllm or sglang
source: str = "emulator"  # emulator, live or recorded
base_url: str = ""  # OpenAI-compatible server, live only
output_dir: str = ""  # empty means write no files

# %% tags=["nbval-ignore-output"]
from matplotlib import pyplot as plt

from kit import notebook, units

run = notebook.begin(
    "00_start_here",
    gpu=gpu,
    model=model,
    scenario=scenario,
    source=source,
    output_dir=output_dir,
)

# %% [markdown]
# ## What does the GPU bring?

# %%
row = {
    "gpu": run.gpu.key,
    "memory_gib": units.gib(run.gpu.memory_bytes),
    "provenance": "quoted",
}
print(notebook.table([row]))

# %%
fig, ax = plt.subplots(figsize=(6.5, 2))
ax.barh([run.gpu.name], [units.gib(run.gpu.memory_bytes)])
ax.set(title="What CUDA reports", xlabel="Memory (GiB)")
plt.show()

# %% [markdown]
# ## Exercise
#
# How many GiB are `gpu_memory_bytes`?

# %% tags=["exercise"]
answer_gib = None
# solution
answer_gib = run.gpu.memory_bytes / 2**30

# %% tags=["exercise"]
print(notebook.check(answer_gib, units.gib(run.gpu.memory_bytes)))

# %% [markdown]
# ## Decision

# %% tags=["nbval-check-output"]
run.finish(
    {"gpu_memory_bytes": run.gpu.memory_bytes},
    [
        f"{run.gpu.name} brings {units.format_bytes(run.gpu.memory_bytes)}.",
        f"Model to place on it: {run.model.key}.",
    ],
)
