"""`kit record`: a proxy between agents and their server that writes down what they do."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kit.cli.options import Json


def command(
    upstream: Annotated[str, typer.Option(help="the server: http://HOST:PORT or https://HOST")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="agents connect here; 0 takes a free one")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    out: Annotated[Path, typer.Option(help="the recording, a new file")] = Path("recording.jsonl"),
    content: Annotated[bool, typer.Option("--content", help="also what was said; never keys")] = False,
    as_json: Json = False,
) -> None:
    """Pass everything on, and write times, token counts, sessions and pauses of each model call to a workload file."""
    from kit.cli.serve import serve
    from kit.record import Recorder
    from kit.record import upstream as server

    target, made = server(upstream), list[Recorder]()

    def make() -> Recorder:
        made.append(Recorder(target, out, content))
        return made[0]

    line = f"passes on to {upstream} and records to {out}; Ctrl-C ends it"
    serve(make, host, port, line, {"upstream": upstream, "out": str(out)}, as_json)
    sys.stderr.write(f"{made[0].calls} calls in {out}: kit load --workload {out}\n")
