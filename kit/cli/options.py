"""The options that every engine-facing command shares, with one help line each."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

from typer import CallbackParam, Option

from kit.engine_config import EngineConfig
from kit.errors import UserError, flag


def _limit(param: CallbackParam, value: float | None) -> float | None:
    """A latency limit as given; refused where no answer could meet it."""
    if value is not None and not value > 0:
        raise UserError(f"{param.opts[0]} must be above 0, got {value:g}")
    return value


def _key(name: str | None) -> str | None:
    """The environment variable's name as given; refused where no key can be read from it."""
    if name is not None and not (os.environ.get(name) and os.environ[name].isprintable()):
        raise UserError(f"--api-key-env {name}: no such environment variable, or no key in it")
    return name


Model = Annotated[str, Option("--model", help="model key, Hugging Face id, or path to a config.json")]
Gpu = Annotated[str, Option("--gpu", help="GPU key of data/gpus.yaml")]
SloTtft = Annotated[float | None, Option("--slo-ttft-s", callback=_limit, help="TTFT limit, seconds")]
SloTpot = Annotated[float | None, Option("--slo-tpot-s", callback=_limit, help="TPOT limit, seconds")]
ApiKeyEnv = Annotated[str | None, Option("--api-key-env", callback=_key, help="environment variable with the key")]
Calibration = Annotated[Path | None, Option("--calibration", help="file of kit calibrate")]
Json = Annotated[bool, Option("--json", help="one JSON object on stdout, nothing else there")]

# Every field of EngineConfig is an option under its own name, with its type and default.
ENGINE_HELP = {
    "engine": "vllm, sglang, tensorrt-llm, tgi or ollama", "engine_version": "default: newest known",
    "gpu_count": "GPUs of one replica", "tensor_parallel_size": "default: --gpu-count",
    "quantization": "bf16, fp8, int8, int4-awq, int4-gptq, int4-bnb, mxfp4, nvfp4", "kv_cache_dtype": "auto or fp8",
    "gpu_memory_utilization": "SGLang: its mem-fraction-static",
}  # fmt: skip


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every engine option; it gets them as one EngineConfig, its argument `config`."""

    def wrapped(**given: Any) -> None:
        command(config=EngineConfig(**{one.name: given.pop(one.name) for one in fields(EngineConfig)}), **given)

    signature = inspect.signature(command)
    own = [one.replace(kind=one.KEYWORD_ONLY) for name, one in signature.parameters.items() if name != "config"]
    parameters = [*own, *map(_parameter, fields(EngineConfig))]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
    wrapped.__doc__ = command.__doc__
    return wrapped


def _parameter(one: Field[Any]) -> inspect.Parameter:
    option = Option(flag(one.name), help=ENGINE_HELP.get(one.name))
    kind = Annotated.__class_getitem__((one.type, option))  # type: ignore[attr-defined]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=kind)


def tell(result: Any, text: Callable[[Any], str], as_json: bool) -> None:
    """The answer on stdout: one JSON object, or as text for people."""
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n" if as_json else text(result))
    sys.stdout.flush()


def number(value: object) -> str:
    """A value as text: four digits of a number, the word where nothing is known."""
    return "unknown" if value is None else f"{value:,.4g}" if isinstance(value, int | float) else str(value)
