"""A recording of `kit record` as a workload: its sessions as they were, again and again."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np

from kit.workload.arrivals import Burst
from kit.workload.body import Body, Prefix, Slo, Source, Workload
from kit.workload.session import Session


class Starts(Burst):
    """The recorded starts, once unless more are asked for; then begun again after `period_s`."""

    starts_s: tuple[float, ...]
    period_s: float

    def mean_rate_per_s(self) -> float:
        return self.size / self.period_s

    def scaled(self, factor: float) -> Self:
        times = {"starts_s": tuple(at / factor for at in self.starts_s), "period_s": self.period_s / factor}
        return self.model_copy(update=times)

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        for lap in count():
            yield from (lap * self.period_s + at for at in self.starts_s)


class Tape(Body):
    """The recorded sessions; a key takes them in turn."""

    sessions: tuple[Session, ...]

    def draw(self, rng: np.random.Generator, key: int, arrival_s: float) -> Session:
        return replace(self.sessions[key % len(self.sessions)], key=key, arrival_s=arrival_s)


def recording(path: Path) -> Workload:
    """The workload of a recording; UserError names the line that cannot be read."""
    from kit.traces import read

    trace = read(str(path), "recorded")
    sessions = tuple(trace.sessions())
    starts = tuple(session.arrival_s for session in sessions)
    calls: dict[str, Any] = {"size": len(sessions), "kind": "step", "starts_s": starts}
    arrivals = Starts.model_construct(**calls, period_s=max(call.end_s for call in trace.calls))
    prefix = Prefix(tokens=max(session.shared_prefix_tokens for session in sessions))
    return Workload.model_construct(
        description=f"recorded: {len(trace.calls)} calls in {len(sessions)} sessions", counts="sessions", slo=Slo(),
        arrivals=arrivals, session=Tape.model_construct(sessions=sessions, shared_prefix=prefix),
        sources=[Source(what="recorded calls", source=path.name, date="")],
    )  # fmt: skip
