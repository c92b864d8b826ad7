"""Which replica a turn goes to."""

from collections.abc import Callable, Sequence
from itertools import count

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
    turn = count()

    def least_loaded(request: Request, last: Replica | None, now: int) -> Replica:
        return min(replicas, key=lambda replica: replica.load)

    def prefix(request: Request, last: Replica | None, now: int) -> Replica:
        def left(replica: Replica) -> tuple[int, int]:
            replica.catch_up(now)
            scheduler = replica.scheduler
            hit = scheduler.pool.match(request.path) * scheduler.config.block_size
            return replica.backlog_tokens - hit, replica.load

        return min(replicas, key=left)

    policies: dict[str, Router] = {
        "round-robin": lambda request, last, now: replicas[next(turn) % len(replicas)],
        "least-loaded": least_loaded,
        "session": lambda request, last, now: last or least_loaded(request, last, now),
        "prefix": prefix,
    }
    if name not in policies:
        raise unknown("routing", name, ROUTINGS)
    return policies[name]
