"""kit emulate: the engine's scheduler in real time behind an OpenAI-compatible server."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kit.cli import options as o
from kit.engine_config import EngineConfig, resolve
from kit.errors import UserError

if TYPE_CHECKING:
    from kit.scheduler import StepTime


@o.engine_options
def command(
    config: EngineConfig,
    model: o.Model,
    gpu: o.Gpu,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    pace: Annotated[str | None, typer.Option(metavar="TTFT_MS,ITL_MS", help="no engine: this for all")] = None,
    truth: Annotated[int | None, typer.Option(metavar="SEED", min=0, help="a hidden machine drawn from it")] = None,
    max_num_queued_reqs: Annotated[int | None, typer.Option(min=1, help="beyond it HTTP 503")] = None,
    as_json: o.Json = False,
) -> None:
    """Serve as that engine on that GPU would schedule; times are the model's, never a GPU's."""
    pace_s = _pace(pace) if pace else None
    from kit import catalog, simulator
    from kit.cli.serve import serve
    from kit.emulator import Api, Clock, Paced, Page, hide

    spec, card = catalog.model(model), catalog.gpu(gpu)
    limits, fitted, warnings = simulator.replica(spec, card, config)
    step_time: StepTime = fitted
    limits = replace(limits, max_num_queued_reqs=max_num_queued_reqs)
    if truth is not None:
        limits, step_time = hide(truth, limits, step_time)
    page = Page(resolve(config, spec, card), model, limits)
    clock = partial(partial(Paced, pace_s) if pace_s else Clock, limits, step_time, page)

    with suppress(ImportError, ValueError, OSError):  # as many connections as the system allows
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    line = f"is ready, emulating {config.engine} with {model} on {gpu}; {'; '.join(warnings)}"
    told = {"model": model, "emulated": True, "warnings": warnings}
    serve(lambda: Api(model, clock()), host, port, line, told, as_json)


def _pace(text: str) -> tuple[float, float]:
    with suppress(ValueError):
        ttft_s, itl_s = (float(part) / 1e3 for part in text.split(","))
        if min(ttft_s, itl_s) > 0 and max(ttft_s, itl_s) < float("inf"):
            return ttft_s, itl_s
    raise UserError(f"--pace {text!r}: want two numbers of milliseconds above 0: TTFT_MS,ITL_MS")
