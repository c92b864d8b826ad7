"""A month by the minute: turns of closed-loop sessions on machines that come and go, at what a replica can do."""

from collections import defaultdict
from math import ceil, exp, inf

import numpy as np
import numpy.typing as npt

from kit.fleet.capacity import Floats, Kind
from kit.fleet.control import TAIL_S, TICK_S, Fleet, Instance

Indices = npt.NDArray[np.int64]
Calls = tuple[Floats, Indices, Indices]  # seconds, session and like which one of the sample, by time
STEP_S = 2.0  # of a replica near its limits
CALM = 0.7  # of the rated load, below which turns in flight follow the load within seconds


class Queue:
    """Turns in the order of their minutes; one that is held or slow delays what its session sends after it."""

    def __init__(self, calls: Calls, end_s: float) -> None:
        self.at_s, (self.who, self.like) = np.minimum(calls[0], end_s - 1), calls[1:]
        self.held = self.taken = np.zeros(0, np.int64)  # turns without a replica, and those that got one last
        sessions = int(self.who.max(initial=-1)) + 1
        self.delay_s, self._held = np.zeros(sessions), np.zeros(sessions, bool)
        self._later: dict[int, list[int]] = defaultdict(list)  # by the minute in which they come
        self._behind: list[int] = []  # turns of sessions whose last one is held
        self._edges = np.searchsorted(self.at_s, np.arange(ceil(end_s / TICK_S) + 1) * TICK_S)

    def minute(self, number: int, begin_s: float, limit_s: float) -> tuple[int, int, int]:
        """The turns that came in that minute, those of them that waited no longer, those that a replica got.

        Replicas take turns from begin_s on.
        """
        due, end_s = self._due(number), (number + 1) * TICK_S
        self.taken = due
        if begin_s <= number * TICK_S and not len(self.held):
            return len(due), len(due), len(due)
        due = self._put_off(due, number, np.sort(np.unique(self.who[due], return_index=True)[1]))
        came_s = np.maximum(self.at_s[due] + self.delay_s[self.who[due]], number * TICK_S)
        queue, waited = np.append(self.held, due), begin_s - came_s
        self._held[self.who[queue]] = begin_s >= end_s
        if begin_s >= end_s:
            self.held, self.taken = queue, queue[:0]
            return len(due), 0, 0
        late = np.append(self.held, due[waited > 0])
        self.delay_s[self.who[late]] = begin_s - self.at_s[late]
        self.taken, self.held = queue, queue[:0]
        self._put_off(np.array(self._behind, np.int64), number, queue[:0])
        self._behind = []
        return len(due), int((waited <= limit_s).sum()), len(queue)

    def _due(self, number: int) -> Indices:
        """The turns that come in that minute, but for those of sessions whose last one is held."""
        due = np.arange(*self._edges[number : number + 2])
        if number in self._later:
            due = np.append(np.array(self._later.pop(number), np.int64), due)
        who = self.who[due]
        came_s = self.at_s[due] + self.delay_s[who]
        return self._put_off(due, number, np.flatnonzero(~self._held[who] & (came_s < (number + 1) * TICK_S)))

    def _put_off(self, due: Indices, number: int, chosen: Indices) -> Indices:
        """Those chosen; the others come as their delay says, a minute later at least, or after what is held."""
        for turn in np.delete(due, chosen).tolist() if len(chosen) < len(due) else ():
            minute = int((self.at_s[turn] + self.delay_s[self.who[turn]]) // TICK_S)
            (self._behind if self._held[self.who[turn]] else self._later[max(number + 1, minute)]).append(turn)
        return due[chosen]


def fill(kind: Kind, in_flight: float, per_s: float, seconds: float) -> tuple[float, float]:
    """Turns in flight on a replica after seconds of that load, and the attainment of those that came meanwhile."""
    calm = CALM * kind.rated_per_s
    if per_s <= calm and kind.flow(in_flight)[0] <= calm:
        in_flight = kind.held(per_s)
        return in_flight, kind.flow(in_flight)[1]
    steps, met = ceil(seconds / STEP_S), 0.0
    for _ in range(steps):
        done_per_s, attainment, _ = kind.flow(in_flight)
        in_flight = max(0.0, in_flight + (per_s - done_per_s) * seconds / steps)
        met += attainment / steps
    return in_flight, met


class Minutes:
    """What the replicas of a fleet hold, and what became of the turns."""

    def __init__(self, fleet: Fleet, stay_s: float) -> None:
        self.fleet, self.total = fleet, dict.fromkeys(("completed", "good", "lost", "resumed"), 0.0)
        self.kept = exp(-TICK_S / stay_s) if fleet.settings.sticky and stay_s else 0.0
        self.shares, self.flight = dict[Instance, float](), dict[Instance, float]()

    def serve(self, queue: Queue, number: int, limit_s: float) -> int:
        """Let the turns of a minute come, be served, be lost with machines that go; returns how many came."""
        now, end_s = number * TICK_S, (number + 1) * TICK_S
        part = {one: min(one.drain_s, end_s) - max(one.ready_s, now) for one in self.fleet.live}
        part = {one: seconds for one, seconds in part.items() if seconds > 0}
        begin_s = min((max(one.ready_s, now) for one in part), default=inf)
        came, in_time, taken = queue.minute(number, begin_s, limit_s)
        self.shares, before, self.flight = _shares(part, self.shares, self.kept), self.flight, {}
        met = cut = slow_s = 0.0
        for one, share in self.shares.items():
            kind = one.group.kind
            load = share * float(kind.work[queue.like[queue.taken]].sum())  # in mean turns
            late = load * max(0, taken - came) / max(1, taken)  # was held, and comes at once
            held, meets = fill(kind, before.get(one, 0.0) + late, (load - late) / part[one], part[one])
            self.flight[one], met = held, met + meets * share
            slow_s += share * max(0.0, held / max(kind.flow(held)[0], 1e-9) - kind.e2el_s)
            if one.end_s < end_s:  # what notice or draining was too short for
                cut += held * max(0.0, 1 - (one.end_s - one.drain_s) / kind.e2el_s)
        if slow_s > 1:
            queue.delay_s[queue.who[queue.taken]] += slow_s
        resume = self.fleet.settings.resume
        self.total["good"] += max(0.0, in_time * met - cut)
        self.total["resumed" if resume else "lost"] += cut
        self.total["completed"] += taken - (0.0 if resume else cut)
        return came


def run_minutes(fleet: Fleet, calls: Calls, slo_ttft_s: float | None, stay_s: float) -> dict[str, float]:
    """Turns completed, within the SLO, lost, sent again and unfinished, from the turns that sessions would send.

    `stay_s` is how old a session is when it sends a turn, on average: new sessions go where there is room, others stay.
    """
    queue, minutes = Queue(calls, fleet.horizon_s + TAIL_S), Minutes(fleet, stay_s)
    rng, total = np.random.default_rng([fleet.seed, 8]), minutes.total
    for number in range(ceil((fleet.horizon_s + TAIL_S) / TICK_S)):
        came = minutes.serve(queue, number, inf if slo_ttft_s is None else slo_ttft_s)
        held = minutes.flight.items()
        counts = {one: float(rng.poisson(in_flight)) for one, in_flight in held}  # the signal counts at an instant
        usage = sum(one.group.kind.flow(in_flight)[2] for one, in_flight in held) / max(1, len(held))
        waiting = len(queue.held) or float(came > 0 and not sum(counts.values()))
        fleet.step((number + 1) * TICK_S, counts, waiting, usage)
    total["good"] = min(total["good"], total["completed"])
    return total | {"unfinished": len(queue.who) - total["completed"] - total["lost"]}


def _shares(part: dict[Instance, float], before: dict[Instance, float], kept: float) -> dict[Instance, float]:
    """Each instance's share of a minute's turns: sessions stay where they are, new ones go where there is room."""
    speed = {one: seconds * one.group.kind.rated_per_s for one, seconds in part.items()}
    stays = {one: kept * before.get(one, 0.0) * seconds / TICK_S for one, seconds in part.items()}
    room = {one: max(0.0, share / sum(speed.values()) - stays[one]) for one, share in speed.items()}
    new = (1 - sum(stays.values())) / max(sum(room.values()), 1e-12)
    return {one: stays[one] + new * room[one] for one in speed}
