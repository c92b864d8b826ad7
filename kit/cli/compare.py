"""`kit compare`: runs of the walkthrough side by side."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kit.cli.options import Json
from kit.errors import UserError

RUNS = typer.Argument(help="folders of GPUs that kit run wrote (runs/<gpu>), or a folder of them")


def command(
    runs: Annotated[list[Path], RUNS],
    out: Annotated[Path, typer.Option(help="folder of compare.png")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """A table and a figure across GPUs: what fits, what answers in time, what was measured."""
    from kit import compare

    found = compare.compare([run for path in runs for run in compare.read(path)])
    if not found["quantities"]:
        raise UserError(
            f"{', '.join(map(str, runs))}: no notebook that compares GPUs has run there: 02, 03, 04, 05, 07"
        )
    found["figure"] = str(compare.figure(found, out))
    for warning in found["warnings"]:
        sys.stderr.write(f"kit compare: {warning}\n")
    sys.stdout.write(json.dumps(found) + "\n" if as_json else f"{compare.table(found)}\n{found['figure']}\n")
