"""kit calibrate: probes of a live server and the coefficients that predict and simulate take from them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kit.cli import options
from kit.engine_config import EngineConfig


@options.engine_options
def command(
    config: EngineConfig,
    base_url: Annotated[str, typer.Option(help="http://HOST:PORT, with or without /v1")],
    model: options.Model,
    gpu: options.Gpu,
    out: Annotated[Path, typer.Option(help="the calibration; its probes are kept beside it")],
    budget_s: Annotated[float, typer.Option(help="seconds of the server's time for all probes")] = 600.0,
    api_key_env: options.ApiKeyEnv = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="the engine runs without a GPU, and the file says so")] = False,
    json_output: options.Json = False,
) -> None:
    """Probes a server for about ten minutes and fits the model's coefficients to it."""
    from kit import catalog
    from kit.calibrate import LiveServer, calibrate, check_out
    from kit.loadgen import Target

    spec, card = catalog.model(model), catalog.gpu(gpu)
    check_out(out, budget_s)
    server = LiveServer(Target(base_url, model, api_key_env=api_key_env), spec)
    found = calibrate(spec, card, config, server, out=out, budget_s=budget_s, on_cpu=cpu)
    options.tell({"out": str(out), **found.told()}, _text, json_output)


def _text(result: dict[str, Any]) -> str:
    """Each probe's medians before and after, then what the file says."""
    lines = [f"{'probe':<14}{'prompt':>8} {'median':<8}{'measured':>12}{'before':>12}{'after':>12}  ms"]
    for row in result["probes"]:
        if row["percentile"] == 50:
            times = "".join(f"{row[name] * 1e3:12,.2f}" for name in ("measured_s", "before_s", "after_s"))
            name = row["quantity"].removesuffix("_s")
            lines.append(f"{row['probe']:<14}{row['group'] or 'mixed':>8} {name:<8}{times}")
    error = ", ".join(f"{name} {100 * (result[f'{name}_factor_90'] - 1):.1f} %" for name in ("ttft", "tpot"))
    lines += [f"90 % of figures left out of the fit are within: {error}", f"{result['probe_s']:.0f} s of probes"]
    return "\n".join([*lines, result["provenance"], f"written: {result['out']}"]) + "\n"
