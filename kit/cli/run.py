"""`kit run`: the walkthrough for one GPU into OUT/<gpu>/index.html."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kit.cli.options import Json
from kit.errors import UserError

OPTIONS = {"gpu": "--gpu", "scenario": "--scenario", "base_url": "--base-url", "output_dir": "--out"}


def command(
    gpu: Annotated[str | None, typer.Option(help="default: this host's, else h100-sxm-80gb")] = None,
    scenario: Annotated[str | None, typer.Option(help="key of data/scenarios, or a YAML file")] = None,
    live: Annotated[bool, typer.Option("--live", help="start an engine here, measure it, stop it")] = False,
    engine: Annotated[str | None, typer.Option(help="vllm or sglang")] = None,
    engine_command: Annotated[str | None, typer.Option(help="its command, with {port} {model} {flags}")] = None,
    base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible server")] = None,
    notebooks: Annotated[str, typer.Option(help="numbers or names: 00,02")] = "",
    out: Annotated[Path, typer.Option(help="folder of the reports")] = Path("runs"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value of a notebook parameter")] = None,
    as_json: Json = False,
) -> int:
    """Run the notebooks through papermill and write a report."""
    from kit import run
    from kit.live import Live
    from kit.scenario import load

    if (live and base_url) or (engine_command and not live):
        raise UserError("--live starts an engine, --base-url has one: give one of them; --engine-command needs --live")
    found = run.visible_gpu()
    key = run.choose_gpu(gpu, found)
    chosen = run.select([name.strip() for name in notebooks.split(",") if name.strip()])
    asked = _settings(settings or [])
    if scenario is not None:
        load(scenario)  # what is wrong with it is told before anything runs
        asked["scenario"] = str(Path(scenario).resolve()) if Path(scenario).is_file() else scenario
    if base_url is not None:
        asked |= {"base_url": run.reachable(base_url), "source": "live"}
    asked |= {"engine": engine} if engine else {}
    walk = run.walkthrough if not live else Live(asked.get("engine", "vllm"), engine_command, bool(found)).walkthrough
    rows, index = walk(chosen, out / key, run.preset(key), asked)
    shown: dict[str, Any] = {"gpu": key, "index": str(index), "notebooks": rows}
    sys.stdout.write(json.dumps(shown) + "\n" if as_json else f"{index}\n")
    failed = [row for row in rows if row["error"]]
    for row in failed:
        sys.stderr.write(f"kit: {row['notebook']} failed: {row['error']}\n")
    return int(bool(failed))


def _settings(pairs: list[str]) -> dict[str, str]:
    """The --set pairs as text by name; what an option sets is left to that option."""
    asked: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair!r} is not name=value")
        if name in OPTIONS:
            raise UserError(f"--set {name}: use {OPTIONS[name]}")
        asked[name] = text
    return asked
