"""Which replica a turn goes to."""

from collections.abc import Callable, Sequence
from itertools import count
from operator import attrgetter

from kit.errors import unknown
from kit.scheduler import Request
from kit.simulator.replica import Replica

Router = Callable[[Request, Replica | None, int], Replica]  # request, replica of the turn before, now
ROUTINGS = ("round-robin", "least-loaded", "session", "prefix")


def router(name: str, replicas: Sequence[Replica]) -> Router:
    """The routing policy of that name; refuses others with the choices.

    round-robin turn by turn; least-loaded by requests running and waiting; session stays with the
    replica of its first turn, found by least load; prefix takes the replica with the fewest prompt
    tokens left to compute, the request's own misses there included.
    """
    turn, load = count(), attrgetter("load")
    policies: tuple[Router, ...] = (
        lambda request, last, now: replicas[next(turn) % len(replicas)],
        lambda request, last, now: min(replicas, key=load),
        lambda request, last, now: last or min(replicas, key=load),
        lambda request, last, now: min(replicas, key=lambda one: one.left_with(request, now)),
    )
    if name not in ROUTINGS:
        raise unknown("routing", name, ROUTINGS)
    return policies[ROUTINGS.index(name)]
