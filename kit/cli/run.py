"""`kit run`: the walkthrough for one GPU into OUT/<gpu>/index.html."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kit.cli.options import Json
from kit.errors import UserError

Gpu = Annotated[str | None, typer.Option("--gpu", help="default: this host's, else h100-sxm-80gb")]
Scenario = Annotated[
    Path | None,
    typer.Option("--scenario", exists=True, dir_okay=False, resolve_path=True, help="YAML file"),
]
BaseUrl = Annotated[str | None, typer.Option("--base-url", help="OpenAI-compatible server")]
Notebooks = Annotated[str, typer.Option("--notebooks", help="numbers or names: 00,02")]
Out = Annotated[Path, typer.Option("--out", help="folder of the reports")]
Set = Annotated[list[str] | None, typer.Option("--set", help="name=value of a notebook parameter")]


def command(
    gpu: Gpu = None,
    scenario: Scenario = None,
    base_url: BaseUrl = None,
    notebooks: Notebooks = "",
    out: Out = Path("runs"),
    settings: Set = None,
    as_json: Json = False,
) -> int:
    """Run the notebooks through papermill and write a report."""
    from kit import run
    from kit.catalog.paths import load_yaml

    key = run.choose_gpu(gpu, run.visible_gpu())
    chosen = run.select([name.strip() for name in notebooks.split(",") if name.strip()])
    asked = _settings(settings or [])
    if scenario is not None:
        load_yaml(scenario)  # broken YAML is told before anything runs
        asked["scenario"] = str(scenario)
    if base_url is not None:
        asked |= {"base_url": run.reachable(base_url), "source": "live"}
    rows, index = run.walkthrough(chosen, out / key, run.preset(key), asked)
    shown: dict[str, Any] = {"gpu": key, "index": str(index), "notebooks": rows}
    sys.stdout.write(json.dumps(shown) + "\n" if as_json else f"{index}\n")
    for row in (row for row in rows if row["error"]):
        sys.stderr.write(f"kit: {row['notebook']} failed: {row['error']}\n")
    return int(any(row["error"] for row in rows))


def _settings(pairs: list[str]) -> dict[str, str]:
    """The --set pairs as text by name; what an option sets is left to that option."""
    asked: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair!r} is not name=value")
        if name in ("gpu", "scenario", "base_url", "output_dir"):
            option = name.replace("_", "-").replace("output-dir", "out")
            raise UserError(f"--set {name}: use --{option}")
        asked[name] = text
    return asked
