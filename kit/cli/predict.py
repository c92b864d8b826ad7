"""kit predict: latency and throughput of a model on a GPU, each with its interval."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit.cli import options

if TYPE_CHECKING:
    from kit.engine_config import EngineConfig


@options.engine_options
def command(
    *,
    config: "EngineConfig",
    model: options.Model,
    gpu: options.Gpu,
    input_tokens: Annotated[int, typer.Option(help="prompt tokens of a request")],
    output_tokens: Annotated[int, typer.Option(help="answer tokens of a request")],
    concurrency: Annotated[int | None, typer.Option(help="streams that always have one request open")] = None,
    request_rate: Annotated[float | None, typer.Option(help="requests a second, at random times")] = None,
    prefix_hit_fraction: Annotated[float, typer.Option(help="share of the prompt that is cached")] = 0.0,
    calibration: Annotated[str | None, typer.Option(help="file of kit calibrate")] = None,
    slo_ttft_s: options.SloTtft = None,
    slo_tpot_s: options.SloTpot = None,
    json_output: options.Json = False,
) -> None:
    """Predicts latency and throughput under a closed loop or an open one."""
    from kit import catalog
    from kit.errors import UserError
    from kit.predict import Ask, predict

    for name, value in (("--slo-ttft-s", slo_ttft_s), ("--slo-tpot-s", slo_tpot_s)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, got {value:g}")
    ask = Ask(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        request_rate=request_rate,
        prefix_hit_fraction=prefix_hit_fraction,
    )
    if calibration is not None:
        raise UserError(f"--calibration {calibration}: kit calibrate is not there yet")
    result = predict(catalog.model(model), catalog.gpu(gpu), config, ask)
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n" if json_output else _text(result))


def _text(result: dict[str, Any]) -> str:
    """The main answers, one a line, times in ms."""
    lines = []
    for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s"):
        parts = [f"{part} {_ms(value)}" for part, value in result[name].items()]
        low, high = result["intervals"].get(f"{name}_mean", (None, None))
        band = f"   mean 90 %: {_ms(low)} to {_ms(high)}" if low is not None else ""
        lines.append(f"{name.removesuffix('_s') + ' ms':<22}{', '.join(parts)}{band}")
    for name in ("output_tokens_per_s", "requests_per_s"):
        lines.append(f"{name:<22}{result[name]:,.4g}")
    lines.append(f"{'limited_by':<22}{result['limited_by']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])]) + "\n"


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value * 1e3:,.4g}"
