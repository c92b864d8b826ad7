"""The options that every engine-facing command shares, with one help line each."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kit.errors import UserError


def _limit(param: typer.CallbackParam, value: float | None) -> float | None:
    """A latency limit as given; refused where no answer could meet it."""
    if value is not None and not value > 0:
        raise UserError(f"{param.opts[0]} must be above 0, got {value:g}")
    return value


Model = Annotated[str, typer.Option("--model", help="model key, Hugging Face id, or path to a config.json")]
Gpu = Annotated[str, typer.Option("--gpu", help="GPU key of data/gpus.yaml")]
Engine = Annotated[str, typer.Option("--engine", help="vllm, sglang, tensorrt-llm, tgi or ollama")]
EngineVersion = Annotated[str | None, typer.Option("--engine-version", help="default: newest known")]
GpuCount = Annotated[int, typer.Option("--gpu-count", help="GPUs of one replica")]
TensorParallelSize = Annotated[int | None, typer.Option("--tensor-parallel-size", help="default: --gpu-count")]
PipelineParallelSize = Annotated[int, typer.Option("--pipeline-parallel-size")]
Quantization = Annotated[
    str | None, typer.Option("--quantization", help="bf16, fp8, int8, int4-awq, int4-gptq, int4-bnb, mxfp4, nvfp4")
]
KvCacheDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="auto or fp8")]
GpuMemoryUtilization = Annotated[
    float | None, typer.Option("--gpu-memory-utilization", help="SGLang: its mem-fraction-static")
]
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len")]
MaxNumSeqs = Annotated[int | None, typer.Option("--max-num-seqs")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option("--max-num-batched-tokens")]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager")]
SloTtft = Annotated[float | None, typer.Option("--slo-ttft-s", callback=_limit, help="TTFT limit, seconds")]
SloTpot = Annotated[float | None, typer.Option("--slo-tpot-s", callback=_limit, help="TPOT limit, seconds")]
Calibration = Annotated[Path | None, typer.Option("--calibration", help="file of kit calibrate")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")]

ENGINE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "engine": (Engine, "vllm"), "engine_version": (EngineVersion, None), "gpu_count": (GpuCount, 1),
    "tensor_parallel_size": (TensorParallelSize, None), "pipeline_parallel_size": (PipelineParallelSize, 1),
    "quantization": (Quantization, None), "kv_cache_dtype": (KvCacheDtype, "auto"),
    "gpu_memory_utilization": (GpuMemoryUtilization, None), "max_model_len": (MaxModelLen, None),
    "max_num_seqs": (MaxNumSeqs, None), "max_num_batched_tokens": (MaxNumBatchedTokens, None),
    "enforce_eager": (EnforceEager, False),
}  # fmt: skip


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every engine option; it gets them as one EngineConfig, its argument `config`."""

    def wrapped(**given: Any) -> None:
        from kit.engine_config import EngineConfig

        command(config=EngineConfig(**{name: given.pop(name) for name in ENGINE_OPTIONS}), **given)

    signature = inspect.signature(command)
    own = [one.replace(kind=one.KEYWORD_ONLY) for name, one in signature.parameters.items() if name != "config"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in ENGINE_OPTIONS.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in (*own, *more)}
    wrapped.__doc__ = command.__doc__
    return wrapped
