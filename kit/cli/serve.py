"""What `kit emulate` and `kit record` share: a server that runs until it is told to stop."""

import sys
from collections.abc import Callable
from typing import Any

from kit.cli.options import tell
from kit.emulator import listen
from kit.loadgen.worker import run_loop


def serve(make: Callable[[], Any], host: str, port: int, line: str, told: dict[str, Any], as_json: bool) -> None:
    """Serve what `make` makes; once connections are taken, its URL with `line` goes to stderr, `told` to stdout."""

    def ready(url: str) -> None:
        sys.stderr.write(f"{url} {line}\n")
        tell({"base_url": url, **told}, lambda _: "", as_json)

    run_loop(listen(make, host, port, ready))
