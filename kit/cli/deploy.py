"""kit deploy: a scenario as a bundle of configuration files; kit deploy check: what of it is proven here."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from kit.cli import options


def command(
    check: Annotated[list[str] | None, Argument(help="check DIR proves a bundle instead of rendering one")] = None,
    scenario: Annotated[str, Option(help="key of data/scenarios, or a YAML file")] = "customer-service",
    architecture: Annotated[str, Option(help="single-node, burst, tiered or multi-node")] = "single-node",
    target: Annotated[str | None, Option(help="compose, dstack or kubernetes; default: the first")] = None,
    gpu: Annotated[str | None, Option(help="key of data/gpus.yaml; default: the cheapest that holds it")] = None,
    engine: Annotated[str, Option(help=options.ENGINE_HELP["engine"])] = "vllm",
    run: Annotated[Path, Option(help="runs of the walkthrough, whose tuned flags are used")] = Path("runs"),
    out: Annotated[Path | None, Option(help="folder of the bundle; its values.yaml is kept")] = None,
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
    options.tell({"out": str(out), **record}, _text, json_output)
    return 0


def _text(record: dict[str, Any]) -> str:
    out = Path(record["out"])
    lines = [f"{out}: {record['architecture']} for {record['target']}, {len(record['files'])} files"]
    for name, pool in record["values"]["pools"].items():
        what = (
            f"{pool['replicas']} x {pool['engine']} {pool['engine_version']}, {pool['gpu_count']} x {pool['gpu']} each"
        )
        lines.append(f"  {name}: {what}, {pool['model']} ({pool['provenance']})")
    if sha256((out / "values.yaml").read_bytes()).hexdigest() != record["values_sha256"]:
        lines.append("  values.yaml is yours and was kept")
    lines += [f"  note: {line}" for line in record["warnings"]]
    return "\n".join([*lines, f"  next: {out}/README.md; change {out}/values.yaml and render again"]) + "\n"


def _check(words: list[str], json_output: bool) -> int:
    """Prints the findings; 1 where one of them failed."""
    from kit.errors import UserError

    if words[0] != "check" or len(words) != 2:
        raise UserError(f"{' '.join(words)!r}: kit deploy check DIR, where DIR holds a bundle")
    from kit.deploy.check import FAILED, check

    found = check(Path(words[1]))
    told = "".join(f"{one.status:<16} {one.check}: {one.reason}\n" for one in found)
    options.tell({"findings": [asdict(one) for one in found]}, lambda _: told, json_output)
    return int(any(one.status == FAILED for one in found))
