"""One engine process group: started, waited for, read, and stopped whatever happens to the caller."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kit.engine_config import engine_data
from kit.engines.launch import Launch, free_port
from kit.errors import UserError
from kit.memory.startlog import read_log
from kit.telemetry import ServerMetrics, read_page

START_DEADLINE_S = 1800.0  # large weights from slow storage, compilation, graph capture
STOP_DEADLINE_S = 20.0
POLL_S = 0.5
# A process of its own that reads the group's number and then waits for the end of its input, which
# comes also when the caller is killed outright; then it stops the group. A word tells it all is done.
GUARD = """
import os, signal, subprocess, sys, time
group, word = int(sys.stdin.readline() or 0), sys.stdin.readline()
if group and not word:
    try:
        os.killpg(group, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
    sys.argv[1:] and subprocess.run(sys.argv[1:])
"""
_FAULT = re.compile(r"(?:[\w.]*(?:Error|Exception)|\berror): \S.*$")


class EngineFailed(UserError):  # noqa: N818
    """The engine did not start; the message holds the decisive line of its log."""


@dataclass
class Engine:
    """A running engine; leaving its `with` block stops it."""

    launch: Launch
    process: "subprocess.Popen[bytes]"
    guard: "subprocess.Popen[bytes]"
    log: Path
    started_s: float = 0.0  # from the start to the first healthy answer

    def start_log(self) -> dict[str, str]:
        """What the start-up log says (kv_cache_tokens, kv_cache_gib, version ..); empty where silent."""
        with contextlib.suppress(UserError):
            return read_log(self.log)[1]
        return {}

    def metrics(self) -> ServerMetrics | None:
        """Its metrics page now; None where it has none. Raises OSError if nothing answers."""
        path = engine_data(self.launch.engine)["metrics"]["path"]
        if path is None:
            return None
        with urllib.request.urlopen(self.launch.base_url + path, timeout=5) as answer:
            return read_page(answer.read().decode(errors="replace"))

    def kv_cache_tokens(self) -> int | None:
        """Tokens of the KV pool, from the log, else from the metrics page."""
        if logged := self.start_log().get("kv_cache_tokens"):
            return int(logged)
        page = self.metrics()
        return int(page.kv_cache_tokens) if page and page.kv_cache_tokens else None

    def stop(self) -> None:
        """SIGTERM to the group, SIGKILL to what is left after a while; safe to call twice."""
        for number, patience_s in ((signal.SIGTERM, STOP_DEADLINE_S), (signal.SIGKILL, 5.0)):
            until = time.monotonic() + patience_s
            _tell(self.process.pid, number)
            while _tell(self.process.pid, 0) and time.monotonic() < until:
                self.process.poll()
                time.sleep(0.05)
        if self.launch.container:
            subprocess.run(_removal(self.launch), capture_output=True, check=False)
        self.guard.communicate(None if self.guard.stdin and self.guard.stdin.closed else b"done\n")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    launch: Launch,
    log: Path,
    *,
    deadline_s: float = START_DEADLINE_S,
    tell: Callable[[str], object] = lambda line: None,
) -> Engine:
    """Start an engine and wait until it serves; its log grows in `log`, progress goes to `tell`.

    Raises EngineFailed with the decisive line of the log.
    """
    _check(launch)
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    watching = [sys.executable, "-c", GUARD, *_removal(launch)]
    guard = subprocess.Popen(watching, stdin=subprocess.PIPE, start_new_session=True)
    with log.open("wb") as output:
        env = os.environ | launch.environment
        process = subprocess.Popen(
            launch.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
    engine = Engine(launch, process, guard, log)
    try:
        assert guard.stdin
        guard.stdin.write(f"{process.pid}\n".encode())
        guard.stdin.flush()
        _await_health(engine, began + deadline_s, tell)
    except BaseException:
        engine.stop()
        raise
    engine.started_s = time.monotonic() - began
    return engine


def _check(launch: Launch) -> None:
    if shutil.which(launch.argv[0]) is None:
        raise EngineFailed(f"{launch.engine}: no program {launch.argv[0]!r}")
    if free_port(launch.port) != launch.port:
        raise EngineFailed(f"{launch.engine}: something serves {launch.host}:{launch.port} already")


def _await_health(engine: Engine, until: float, tell: Callable[[str], object]) -> None:
    launch, told = engine.launch, ""
    while not _healthy(launch.base_url + launch.health):
        last = _last_line(engine.log)
        if engine.process.poll() is not None:
            reason = decisive_line(engine.log.read_text(errors="replace"), launch.failure_noise)
            raise EngineFailed(f"{launch.engine} did not start: {reason} (log: {engine.log})")
        if time.monotonic() > until:
            raise EngineFailed(f"{launch.engine} is not healthy yet; last line: {last} (log: {engine.log})")
        if last != told:
            tell(last)
        told = last
        time.sleep(POLL_S)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def decisive_line(text: str, noise: list[str]) -> str:
    """The last exception or error of a log that does not merely point to another one.

    >>> log = "ValueError: no room for the KV cache\\nRuntimeError: core failed. See root cause above."
    >>> decisive_line(log, ["core failed"])
    'ValueError: no room for the KV cache'
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    skipped = re.compile("|".join(noise) or r"\Z.")
    faults = [m[0] for line in lines if (m := _FAULT.search(line)) and not skipped.search(line)]
    errors = [line for line in lines if re.search(r"\b(ERROR|FATAL|Killed)\b", line)]
    return (faults or errors or lines or ["its log is empty"])[-1].strip()


def _tell(group: int, number: int) -> bool:
    """Send a signal to the group (0 only asks); false when nobody of it is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the second: macOS, of a group of zombies
        return False
    return True


def _removal(launch: Launch) -> list[str]:
    return ["docker", "rm", "--force", launch.container] if launch.container else []
