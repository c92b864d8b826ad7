"""kit predict: latency and throughput of a model on a GPU, each with its interval."""

from typing import Annotated, Any

import typer

from kit.cli import options
from kit.engine_config import EngineConfig


@options.engine_options
def command(
    *,
    config: EngineConfig,
    model: options.Model,
    gpu: options.Gpu,
    input_tokens: Annotated[int, typer.Option(help="prompt tokens of a request")],
    output_tokens: Annotated[int, typer.Option(help="answer tokens of a request")],
    concurrency: Annotated[int | None, typer.Option(help="streams that always have one request open")] = None,
    request_rate: Annotated[float | None, typer.Option(help="requests a second, at random times")] = None,
    prefix_hit_fraction: Annotated[float, typer.Option(help="share of the prompt that is cached")] = 0.0,
    calibration: options.Calibration = None,
    slo_ttft_s: options.SloTtft = None,
    slo_tpot_s: options.SloTpot = None,
    json_output: options.Json = False,
) -> None:
    """Predicts latency and throughput under a closed loop or an open one."""
    from kit import catalog
    from kit.predict import Ask, predict

    ask = Ask(input_tokens, output_tokens, concurrency, request_rate, prefix_hit_fraction, slo_ttft_s, slo_tpot_s)
    spec, card, basis = catalog.model(model), catalog.gpu(gpu), None
    if calibration is not None:
        from kit.calibrate import load

        config, basis = load(calibration).apply(spec, card, config)
    result = predict(spec, card, config, ask, basis)
    options.tell(result, _text, json_output)


def _text(result: dict[str, Any]) -> str:
    """The main answers, one a line, times in ms."""
    lines = []
    for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s"):
        parts = [f"{part} {_ms(value)}" for part, value in result[name].items()]
        band = result["intervals"].get(f"{name}_mean")
        around = f"   mean, 90 %: {_ms(band[0])} to {_ms(band[1])}" if band else ""
        lines.append(f"{name.removesuffix('_s') + ' ms':<24}{', '.join(parts)}{around}")
    for name in ("output_tokens_per_s", "requests_per_s", "slo_attainment_fraction"):
        lines.append(f"{name:<24}{options.number(result[name])}")
    lines.append(f"{'limited_by':<24}{result['limited_by']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])]) + "\n"


def _ms(value: float | None) -> str:
    return options.number(value and value * 1e3)
