"""Agent workloads: what a session asks of a server, and when sessions come.

What the simulator and the load generator share is an iterator of `Session`, ordered by `arrival_s`.
Sessions arrive open-loop. Turns inside a session are closed-loop: turn k + 1 is sent
`pause_after_s` after turn k and every child of it have ended (join).

Context rule: turn 0 sends `shared_prefix_tokens` (system prompt and tools, the same for all
sessions with one `prefix_id`) and then its `new_tokens`; each later turn sends all that came
before (prompts and outputs) and then its own `new_tokens`. `compact_to` replaces the session's own
context, not the shared prefix, by that many fresh tokens before the turn's `new_tokens`.
`Session.input_lens()` applies the rule.
"""

from collections.abc import Iterator
from itertools import islice, takewhile
from math import inf
from pathlib import Path

import numpy as np

from kit.errors import UserError, unknown
from kit.workload.arrivals import Burst
from kit.workload.body import Workload
from kit.workload.distribution import Distribution
from kit.workload.recording import recording
from kit.workload.session import Session, Turn

__all__ = ["Distribution", "Session", "Turn", "Workload", "generate", "load", "names"]

SUFFIXES = ".yaml", ".jsonl"
RECORDING = b'{"kit_recording"'  # how a file of kit record begins
FOLDER = Path(__file__).resolve().parents[2] / "data" / "workloads"


def names() -> list[str]:
    """Keys of data/workloads."""
    return sorted(path.stem for path in FOLDER.iterdir() if path.suffix in SUFFIXES)


def load(name: str) -> Workload:
    """The workload with this key, of this YAML file or recording; UserError names file and field, or line."""
    import yaml
    from pydantic import ValidationError

    places = (Path(name), *(FOLDER / f"{name}{suffix}" for suffix in SUFFIXES))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise unknown("workload", name, names())
    with path.open("rb") as file:
        if file.read(len(RECORDING)) == RECORDING:
            return recording(path)
    try:
        return Workload.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        value = "" if isinstance(first["input"], dict | list) else f" (got {first['input']!r})"
        raise UserError(f"{path}: {where}: {first['msg']}{value}") from None


def generate(
    workload: Workload, seed: int, *, sessions: int | None = None, duration_s: float | None = None
) -> Iterator[Session]:
    """Sessions by arrival: at most `sessions`, before `duration_s`, the same for the same seed.

    With both given the rates are scaled so that `sessions` are expected within `duration_s`; with
    neither, a `step` or `batch` comes once.
    """
    arrivals = workload.arrivals
    if duration_s is not None:
        arrivals = arrivals.within(duration_s, sessions)
    elif sessions is None:
        if not isinstance(arrivals, Burst):
            raise UserError("give a number of sessions or a duration: the arrivals never end")
        sessions = arrivals.size
    times = islice(arrivals.times(np.random.default_rng([seed, 0])), sessions)
    for key, at_s in enumerate(takewhile(lambda at_s: at_s < (duration_s or inf), times)):
        yield workload.session.draw(np.random.default_rng([seed, 1, key]), key, at_s)
