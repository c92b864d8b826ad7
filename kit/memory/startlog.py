"""A pasted start-up log beside the prediction: line by line, with the reason for a difference."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kit.catalog import ModelSpec, model
from kit.catalog.quantization import QUANTIZATIONS
from kit.engine_config import EngineConfig, engine_data
from kit.errors import UserError
from kit.memory.plan import MemoryPlan, plan
from kit.memory.shape import Term
from kit.units import GIB, MIB, gib

_FLAGS = {"gpu_memory_utilization": float, "max_num_seqs": int, "max_num_batched_tokens": int, "max_model_len": int}


@dataclass(frozen=True, slots=True)
class Compared:
    """One line of the log: measured and predicted in the unit of its name, and why they differ."""

    line: str
    measured: float
    predicted: float
    half_width: float
    reason: str


def read_log(path: Path) -> tuple[str, dict[str, str]]:
    """The engine whose start-up log this is, and the values found in it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--log {path}: {error.strerror}") from None
    found = {engine: _find(text, engine) for engine in ("vllm", "sglang")}
    engine = max(found, key=lambda name: len(found[name]))
    values = found[engine]
    if not {"weights_gib", "kv_cache_gib", "kv_cache_tokens"} & set(values):
        raise UserError(
            f"--log {path}: no start-up line of vLLM or SGLang in it "
            "(looked for weights, KV cache memory and KV cache tokens)"
        )
    if engine == "sglang" and "k_gib" in values:
        values["kv_cache_gib"] = str(float(values["k_gib"]) + float(values.get("v_gib", 0)))
    return engine, values


def _find(text: str, engine: str) -> dict[str, str]:
    values = {}
    for name, patterns in engine_data(engine)["log_lines"].items():
        for pattern in patterns:
            if matches := re.findall(pattern, text):
                values[name] = str(matches[-1]).replace(",", "")
                break
    return values


def config_from_log(config: EngineConfig, engine: str, values: dict[str, str]) -> EngineConfig:
    """The asked configuration, its open flags filled from the log; the log's engine decides."""
    filled: dict[str, Any] = {
        name: kind(values[name]) for name, kind in _FLAGS.items() if name in values and getattr(config, name) is None
    }
    if config.tensor_parallel_size is None and config.gpu_count == 1:
        filled["tensor_parallel_size"] = int(values.get("tensor_parallel_size", 1))
    version = config.engine_version or values.get("version")
    return replace(config, engine=engine, engine_version=version, **filled)


def compare(memory: MemoryPlan, values: dict[str, str], config: EngineConfig) -> Iterator[Compared]:
    """Each line that the log has, in order of cause: memory, weights, peak, pool, tokens."""
    size = memory.gpu.memory_bytes
    total = Term(size, memory.gpu.memory_relative_uncertainty * size)
    lines = {
        "gpu_memory_gib": (total, "another card, or ECC switched the other way"),
        "weights_gib": (memory.weights, _weights_reason(memory, values, config)),
        "activation_gib": (memory.activation, _activation_reason(memory, values, config)),
        "non_torch_gib": (memory.non_torch, "communication buffers or libraries that this build loads or leaves out"),
        "cuda_graph_gib": (memory.cuda_graph, "graphs are estimated from layers and batch sizes only"),
        "kv_cache_gib": (memory.pool, "follows from the lines above: utilisation x memory less each of them"),
    }
    for name, (term, reason) in lines.items():
        if name in values:
            yield _line(name, values, term, reason)
    if "kv_cache_tokens" in values:
        low, high = (memory.kv_cache_tokens(size) for size in memory.kv_cache_bytes_interval)
        tokens, measured = memory.kv_cache_tokens(), float(values["kv_cache_tokens"])
        inside = low <= measured <= high
        reason = "within the interval" if inside else _tokens_reason(memory, values)
        yield Compared("kv_cache_tokens", measured, tokens, (high - low) / 2, reason)


def _line(name: str, values: dict[str, str], term: Term, reason: str) -> Compared:
    measured, slack = float(values[name]), term.half_width_bytes + 6 * MIB  # two printed decimals
    inside = abs(measured * GIB - term.size_bytes) <= slack
    text = "within the interval" if inside else reason
    return Compared(name, measured, gib(term.size_bytes), gib(term.half_width_bytes), text)


def _weights_reason(memory: MemoryPlan, values: dict[str, str], config: EngineConfig) -> str:
    """Another quantisation that would explain the weights, else what is commonly added."""
    measured = float(values.get("weights_gib", 0)) * GIB
    for quantization in QUANTIZATIONS:
        other = plan(memory.model, memory.gpu, replace(config, quantization=quantization))
        if abs(other.weights.size_bytes - measured) < 0.015 * measured:
            return f"matches --quantization {quantization}, not {memory.config.quantization}"
    return "other modules loaded (LoRA, draft model, vision tower) or layers kept in 16 bits"


def _activation_reason(memory: MemoryPlan, values: dict[str, str], config: EngineConfig) -> str:
    """Another batch limit that would explain the activation peak, else what is not modelled."""
    measured = float(values.get("activation_gib", 0)) * GIB
    for seqs in (1, 8, 16, 32, 64, 128, 256, 512, 1024):
        for tokens in (2048, 4096, 8192, 16384):
            changed = replace(config, max_num_seqs=seqs, max_num_batched_tokens=tokens)
            other = plan(memory.model, memory.gpu, changed).activation.size_bytes
            if abs(other - measured) < 0.01 * measured:
                return f"matches --max-num-seqs {seqs} with --max-num-batched-tokens {tokens}"
    return "the profiling run held more or less than one batch: images, LoRA, another sampler"


def _tokens_reason(memory: MemoryPlan, values: dict[str, str]) -> str:
    if "kv_cache_gib" not in values:
        return "the pool itself differs; its line is missing from the log"
    expected = memory.kv_cache_tokens(float(values["kv_cache_gib"]) * GIB)
    ratio = float(values["kv_cache_tokens"]) / max(expected, 1)
    for factor, why in ((2.0, "an 8-bit"), (0.5, "a 16-bit")):
        if abs(ratio / factor - 1) < 0.03:
            return f"the logged pool holds {ratio:.2f} times the tokens: {why} KV cache"
    if abs(ratio - 1) < 0.01:
        return "the logged pool holds these tokens: the difference is the pool's"
    return "hybrid layer groups print a derived number; compare the maximum concurrency instead"


def other_model(values: dict[str, str], spec: ModelSpec) -> Iterator[str]:
    """A warning where the log names another model than the one asked for."""
    name = values.get("model", "/")
    if name.startswith(("/", ".")):
        return
    try:
        found = model(name)
    except UserError:
        return
    if found.key != spec.key:
        yield f"the log is of {name}, not of {spec.key}"
