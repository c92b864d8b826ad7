"""kit deploy: a scenario as a bundle of configuration files; kit deploy check: what of it is proven here."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kit.cli import options


def command(
    check: Annotated[
        list[str] | None, typer.Argument(help="check DIR proves a bundle instead of rendering one")
    ] = None,
    scenario: Annotated[str, typer.Option(help="key of data/scenarios, or a YAML file")] = "customer-service",
    architecture: Annotated[str, typer.Option(help="single-node, burst, tiered or multi-node")] = "single-node",
    target: Annotated[str | None, typer.Option(help="compose, dstack or kubernetes; default: the first")] = None,
    gpu: Annotated[str | None, typer.Option(help="key of data/gpus.yaml; default: the cheapest that holds it")] = None,
    engine: options.Engine = "vllm",
    run: Annotated[Path, typer.Option(help="runs of the walkthrough, whose tuned flags are used")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="folder of the bundle; its values.yaml is kept")] = None,
    json_output: options.Json = False,
) -> int | None:
    """Writes a bundle with its README and values.yaml, or checks one."""
    from kit.deploy import Source, render
    from kit.errors import UserError
    from kit.scenario import load

    if check:
        return _check(check, json_output)
    if out is None:
        raise UserError("--out: name the folder of the bundle")
    case = load(Path(scenario) if Path(scenario).is_file() else scenario)
    record = render(Source(case, gpu, engine, run), architecture, out, target)
    sys.stdout.write(json.dumps({"out": str(out), **record}) + "\n" if json_output else _text(out, record))
    return None


def _text(out: Path, record: dict[str, Any]) -> str:
    lines = [f"{out}: {record['architecture']} for {record['target']}, {len(record['files'])} files"]
    for name, pool in record["values"]["pools"].items():
        what = (
            f"{pool['replicas']} x {pool['engine']} {pool['engine_version']}, {pool['gpu_count']} x {pool['gpu']} each"
        )
        lines.append(f"  {name}: {what}, {pool['model']} ({pool['provenance']})")
    return "\n".join([*lines, f"  next: {out}/README.md; change {out}/values.yaml and render again"]) + "\n"


def _check(words: list[str], json_output: bool) -> int:
    """Prints each finding; 1 where one failed."""
    from kit.errors import UserError

    if words[0] != "check" or len(words) != 2 or not (Path(words[1]) / "bundle.json").is_file():
        raise UserError(f"{' '.join(words)!r}: kit deploy check DIR, where DIR holds a bundle that kit deploy rendered")
    from kit.deploy.check import FAILED, OPEN, PASSED, check

    findings = check(Path(words[1]))
    counts = {status: sum(one.status == status for one in findings) for status in (PASSED, FAILED, OPEN)}
    if json_output:
        told = {name.split(" here")[0].replace(" ", "_"): number for name, number in counts.items()}
        sys.stdout.write(json.dumps({**told, "findings": [asdict(one) for one in findings]}) + "\n")
    else:
        width = max(len(one.check) for one in findings)
        lines = [f"{one.status:<17}  {one.check:<{width}}  {one.reason}" for one in findings]
        sys.stdout.write("\n".join([*lines, ", ".join(f"{n} {name}" for name, n in counts.items())]) + "\n")
    return int(counts[FAILED] > 0)
