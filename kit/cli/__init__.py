"""The `kit` command: one module per subcommand, imported only when it is called."""

import importlib
import os
import re
import signal
import sys
from errno import EDQUOT, ENOSPC
from threading import Timer
from traceback import walk_stack
from types import FrameType
from typing import Any

from kit.errors import UserError, unknown

COMMANDS = {
    "size": "what fits on a GPU: weights, KV pool, sessions",
    "predict": "latency and throughput of a model on a GPU, with intervals",
    "simulate": "agent sessions through the scheduler in virtual time",
    "fleet": "what traffic costs under spot, reserved, burst and other policies",
    "emulate": "the engine in real time behind an OpenAI-compatible server, without a GPU",
    "load": "load-test an OpenAI-compatible server",
    "calibrate": "ten minutes of probes of a live server, for predict and simulate",
    "compare": "runs of several GPUs side by side",
    "record": "what agents ask of a server, as a workload to play again",
    "deploy": "a bundle to run it: engines, NGINX, monitoring; and the check of one",
    "tune": "max_num_seqs and its companions for an SLO, confirmed in few engine starts",
    "run": "the notebooks through papermill into a report",
}


def main() -> None:
    """Entry point: runs kit.cli.<command>.command; bad input is one line and exit code 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print_help()
    sys.unraisablehook = _lost
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        if arguments[0] not in COMMANDS:
            raise unknown("command", arguments[0], COMMANDS)
        _call(arguments[0], arguments[1:])
    except UserError as error:
        sys.stderr.write(f"kit: {error}\n")
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk; anything else is a fault of ours
        if error.filename is None and error.errno not in (ENOSPC, EDQUOT):
            raise
        sys.stderr.write(f"kit: {error.filename or 'what was to be written is not'}: {error.strerror}\n")
        sys.exit(2)
    except (KeyboardInterrupt, EOFError):
        goes_on = (arguments[0] in ("load", "tune", "calibrate") and "--out" in arguments) or "--live" in arguments
        kept = "; the same command goes on with what is in --out" if goes_on else ""
        sys.stderr.write(f"kit: interrupted{kept}\n")
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A Ctrl-C waits for an import's end: compiled modules (numpy, scipy) swallow it or call it a failed start."""
    importing = any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in walk_stack(frame))
    _again() if importing else signal.default_int_handler(number, frame)


def _again() -> None:
    Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


def _lost(error: Any) -> None:
    """A Ctrl-C that fell into a callback of Python's own is not lost: it comes again."""
    _again() if issubclass(error.exc_type, KeyboardInterrupt) else sys.__unraisablehook__(error)


def _print_help() -> None:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    sys.stdout.write("usage: kit COMMAND [OPTIONS]   (kit COMMAND --help)\n\n" + "\n".join(lines) + "\n")


def _call(name: str, arguments: list[str]) -> None:
    """Run one command function through typer without its own error boxes."""
    import typer
    from typer.exceptions import TyperException

    module = importlib.import_module(f"kit.cli.{name}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(module.command)
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name=f"kit {name}", standalone_mode=False)
    except TyperException as error:
        raise UserError(_naming_the_value(error.format_message(), arguments)) from None
    if code == 130:  # typer's, for Ctrl-C
        raise KeyboardInterrupt
    if isinstance(code, int) and code:
        sys.exit(code)


def _naming_the_value(message: str, arguments: list[str]) -> str:
    """The message with the value that was given, which typer leaves out."""
    match = re.search(r"Invalid value for '(--[\w-]+)'", message)
    if not match:
        return message
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, given = option.partition("=")
        if name == match[1]:
            given = given if equals else value
            return f"{match[1]} {given!r}: {message.partition(': ')[2]}"
    return message
