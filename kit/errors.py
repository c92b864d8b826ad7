"""Bad input and how it is told: one line that names the value and the choices."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend; the command line prints it without a traceback and exits 2."""


def unknown(kind: str, value: object, choices: Iterable[str], *, shown: int = 12) -> UserError:
    """A UserError that names the bad value and the nearest of the choices, then the others.

    >>> str(unknown("engine", "vlm", ["sglang", "vllm"]))
    "unknown engine 'vlm'; nearest: vllm; choices: sglang, vllm"
    """
    names = sorted(choices)
    folded = {name.lower(): name for name in names}
    near = [folded[name] for name in get_close_matches(str(value).lower(), folded, n=5, cutoff=0.5)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    rest = f", ... {len(names) - shown} more" if len(names) > shown else ""
    return UserError(f"unknown {kind} {value!r}{hint}; choices: {', '.join(names[:shown])}{rest}")


def flag(name: str) -> str:
    """An option as it is typed.

    >>> flag("max_num_seqs")
    '--max-num-seqs'
    """
    return "--" + name.replace("_", "-")


def at_least(least: int, **given: float) -> None:
    """Refuses the first of these options that lies below."""
    for name, value in given.items():
        if value < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
