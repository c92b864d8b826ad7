"""Engine options as given, and with every default of that engine version filled in."""

import re
from dataclasses import dataclass, replace
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.catalog.paths import DATA, load_yaml
from kit.catalog.quantization import check_quantization
from kit.errors import UserError, at_least, unknown

ENGINES = ("vllm", "sglang", "tensorrt-llm", "tgi", "ollama")
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One replica's engine flags; None means the default of that engine version on that GPU."""

    engine: str = "vllm"
    engine_version: str | None = None
    gpu_count: int = 1
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """EngineConfig with nothing left open."""

    engine_version: str
    tensor_parallel_size: int
    quantization: str
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int

    @property
    def kv_dtype_bytes(self) -> int:
        """Bytes of one cached element."""
        return 1 if self.kv_cache_dtype == "fp8" else 2


def engine_data(engine: str) -> dict[str, Any]:
    """data/engines/<engine>.yaml; refuses an unknown engine."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    return dict(load_yaml(DATA / "engines" / f"{engine}.yaml"))


def version_tuple(version: str) -> tuple[int, ...]:
    """Numeric part of a version, development suffixes cut.

    >>> version_tuple("0.26.1rc1.dev608+g99a1")
    (0, 26, 1)
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version.strip())
    if not match:
        raise UserError(f"engine version {version!r} is not of the form 0.32.0")
    return tuple(int(part or 0) for part in match.groups())


def by_version(eras: Any, version: str) -> Any:
    """The value of the last era that began by that version; a plain value stands for all."""
    if not isinstance(eras, list):
        return eras
    now = version_tuple(version)
    reached = [era["value"] for era in eras if version_tuple(str(era["from"])) <= now]
    return reached[-1] if reached else eras[0]["value"]


def resolve(config: EngineConfig, model: ModelSpec, gpu: GpuSpec) -> ResolvedConfig:
    """Every flag filled with the defaults of that engine version; impossible ones are refused."""
    data = engine_data(config.engine)
    version = _version(config, data)
    tensor, pipeline, count = _parallel(config)
    check_parallel(model, tensor, pipeline)
    defaults = _defaults(config, data, version, model, gpu, tensor)
    own_cache = config.engine == "vllm" and config.kv_cache_dtype == "auto"  # read from its source, 0.32
    resolved = ResolvedConfig(
        engine=config.engine,
        engine_version=version,
        gpu_count=count,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        quantization=check_quantization(config.quantization or model.quantization or "bf16"),
        kv_cache_dtype=model.kv_cache_dtype if own_cache else config.kv_cache_dtype,
        enforce_eager=config.enforce_eager,
        **defaults,
    )
    _check(resolved)
    return replace(resolved, max_num_seqs=min(resolved.max_num_seqs, resolved.max_num_batched_tokens))


def _version(config: EngineConfig, data: dict[str, Any]) -> str:
    version = config.engine_version or str(data["newest"])
    if version_tuple(version) < version_tuple(str(data["first"])):
        reason = str(data.get("refused_below", "not known to this kit")).strip()
        raise UserError(f"{data['name']} {version} runs {reason}; choices: {data['first']} to {data['last']}")
    return version


def _parallel(config: EngineConfig) -> tuple[int, int, int]:
    """Tensor, pipeline and GPU count; TP fills what --gpu-count leaves."""
    pipeline = config.pipeline_parallel_size
    at_least(1, gpu_count=config.gpu_count, pipeline_parallel_size=pipeline)
    tensor = config.tensor_parallel_size
    if tensor is None:
        if config.gpu_count == 1:
            return 1, pipeline, pipeline
        if config.gpu_count % pipeline:
            raise UserError(f"--gpu-count {config.gpu_count} is no multiple of --pipeline-parallel-size {pipeline}")
        return config.gpu_count // pipeline, pipeline, config.gpu_count
    at_least(1, tensor_parallel_size=tensor)
    if config.gpu_count not in (1, tensor * pipeline):
        raise UserError(
            f"--gpu-count {config.gpu_count} is not --tensor-parallel-size {tensor} "
            f"x --pipeline-parallel-size {pipeline}"
        )
    return tensor, pipeline, tensor * pipeline


def tensor_parallel_sizes(model: ModelSpec, limit: int = 64) -> list[int]:
    """TP sizes that can run: they divide the heads, and KV heads divide or are duplicated."""
    kv_heads = model.num_key_value_heads or 1
    heads = model.num_attention_heads or 1

    def runs(size: int) -> bool:
        shared = model.is_mla or kv_heads % size == 0 or size % kv_heads == 0
        return heads % size == 0 and shared

    return [size for size in range(1, limit + 1) if runs(size)]


def check_parallel(model: ModelSpec, tensor: int, pipeline: int) -> None:
    """Refuses TP that does not divide the heads, with the sizes that can run, and excess PP."""
    sizes = tensor_parallel_sizes(model)
    if tensor not in sizes:
        raise UserError(
            f"--tensor-parallel-size {tensor} does not divide the {model.num_attention_heads} "
            f"attention heads ({model.num_key_value_heads} KV heads) of {model.key}; "
            f"sizes that can run: {', '.join(str(size) for size in sizes if size <= 16)}"
        )
    if pipeline > model.num_hidden_layers:
        raise UserError(
            f"--pipeline-parallel-size {pipeline} exceeds the {model.num_hidden_layers} layers of {model.key}"
        )


def _defaults(
    config: EngineConfig, data: dict[str, Any], version: str, model: ModelSpec, gpu: GpuSpec, tensor: int
) -> dict[str, Any]:
    """Values of the open flags, in the engine's own way of choosing them."""
    defaults = data["defaults"]
    tier = _tier(defaults, gpu, version)
    values = {
        name: by_version(tier.get(name, defaults.get(name)), version)
        for name in ("gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs", "block_size")
    }
    values["max_model_len"] = model.max_position_embeddings
    for name in values:
        given = getattr(config, name, None)
        if given is not None:
            values[name] = given
    if values["gpu_memory_utilization"] is None:
        values["gpu_memory_utilization"] = _sglang_fraction(tier, gpu, tensor, config)
    return values


def _tier(defaults: dict[str, Any], gpu: GpuSpec, version: str) -> dict[str, Any]:
    """The defaults of this GPU's memory class."""
    excepted = any(part in gpu.key for part in by_version(defaults.get("large_gpu_except", ()), version))
    if "tiers" in defaults:
        return next(
            dict(tier)
            for tier in defaults["tiers"]
            if tier["below_gib"] is None or gpu.memory_bytes < tier["below_gib"] * 2**30
        )
    size = "large" if gpu.memory_bytes >= defaults["large_gpu_bytes"] and not excepted else "small"
    return {
        name: defaults[name][size] if isinstance(defaults[name], dict) else defaults[name]
        for name in ("max_num_batched_tokens", "max_num_seqs")
    }


def _sglang_fraction(tier: dict[str, Any], gpu: GpuSpec, tensor: int, config: EngineConfig) -> float:
    """SGLang's own mem-fraction-static: its heuristic leaves room for activations and graphs."""
    chunk = config.max_num_batched_tokens or tier["max_num_batched_tokens"]
    graph_rows = tier["cuda_graph_max_bs"][0 if tensor < 4 else 1]
    workers = tensor * config.pipeline_parallel_size
    reserved_mib = 512 + 1.5 * max(chunk, 2048) + 2 * graph_rows + workers / 8 * 1024
    if gpu.memory_bytes > 60 * 2**30:
        reserved_mib = max(reserved_mib, 10 * 1024)
    memory_mib = gpu.memory_bytes / 2**20
    return float(round((memory_mib - reserved_mib) / memory_mib, 3))


def _check(config: ResolvedConfig) -> None:
    if not 0 < config.gpu_memory_utilization <= 1:
        raise UserError(f"--gpu-memory-utilization must lie above 0 and at most 1, got {config.gpu_memory_utilization}")
    if config.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise unknown("--kv-cache-dtype", config.kv_cache_dtype, KV_CACHE_DTYPES)
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    at_least(1, **{name: getattr(config, name) for name in limits})
