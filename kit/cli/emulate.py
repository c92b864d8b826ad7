"""kit emulate: the engine's scheduler in real time behind an OpenAI-compatible server."""

import asyncio
import json
import sys
from contextlib import suppress
from typing import Annotated

import typer

from kit.cli import options as o
from kit.errors import UserError


def command(
    model: o.Model,
    gpu: o.Gpu,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    pace: Annotated[
        str | None, typer.Option(metavar="TTFT_MS,ITL_MS", help="no engine: this pace for every stream")
    ] = None,
    truth: Annotated[int | None, typer.Option(metavar="SEED", min=0, help="a hidden machine drawn from it")] = None,
    max_num_queued_reqs: Annotated[int | None, typer.Option(min=1, help="more waiting requests get HTTP 503")] = None,
    engine: o.Engine = "vllm",
    engine_version: o.EngineVersion = None,
    gpu_count: o.GpuCount = 1,
    tensor_parallel_size: o.TensorParallelSize = None,
    pipeline_parallel_size: o.PipelineParallelSize = 1,
    quantization: o.Quantization = None,
    kv_cache_dtype: o.KvCacheDtype = "auto",
    gpu_memory_utilization: o.GpuMemoryUtilization = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    enforce_eager: o.EnforceEager = False,
    as_json: o.Json = False,
) -> None:
    """Serve as that engine on that GPU would schedule; times are the model's, never a GPU's."""
    given = dict(locals())
    from dataclasses import replace

    from kit import catalog, simulator
    from kit.emulator import Api, Machine, listen
    from kit.engine_config import EngineConfig, resolve

    config = EngineConfig(**{name: given[name] for name in EngineConfig.__dataclass_fields__})
    pace_s, spec, card = _pace(pace), catalog.model(model), catalog.gpu(gpu)
    limits, step_time, warnings = simulator.replica(spec, card, config)
    limits = replace(limits, max_num_queued_reqs=max_num_queued_reqs)
    machine = Machine(model, resolve(config, spec, card), limits, step_time, truth, pace_s)

    def ready(url: str) -> None:
        told = {"base_url": url, "model": model, "emulated": True, "warnings": warnings}
        sys.stderr.write(f"{url} is ready (emulated {engine}, model {model}, {gpu}); {'; '.join(warnings)}\n")
        if as_json:
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()

    async def serve() -> None:
        await listen(Api(machine, asyncio.get_running_loop()), host, port, ready)

    _open_files()
    with suppress(ImportError):
        import uvloop

        uvloop.run(serve())
        return
    asyncio.run(serve())


def _pace(text: str | None) -> tuple[float, float] | None:
    try:
        ttft_ms, itl_ms = map(float, (text or "1,1").split(","))
    except ValueError:
        ttft_ms = itl_ms = -1.0
    if not (0 < ttft_ms < float("inf") and 0 < itl_ms < float("inf")):
        raise UserError(f"--pace {text!r}: want two numbers of milliseconds above 0: TTFT_MS,ITL_MS")
    return (ttft_ms / 1e3, itl_ms / 1e3) if text else None


def _open_files() -> None:
    """As many connections as the system allows."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
