"""A day simulated whole: every turn through the scheduler of a replica that comes, goes and is reclaimed."""

from collections.abc import Callable
from typing import Any

from kit.fleet.control import TAIL_S, TICK_S, Fleet, Instance
from kit.scheduler import Request
from kit.simulator import TICKS_PER_S, Simulation, SimulationConfig
from kit.simulator.loop import SessionState
from kit.simulator.replica import Replica
from kit.simulator.steps import StepClock


class FleetDay(Simulation):
    """The simulator's loop on the machines of a Fleet; turns without a replica wait for one."""

    def __init__(self, fleet: Fleet, tick_s: float = TICK_S) -> None:
        main = fleet.groups[0].kind
        super().__init__(SimulationConfig(main.scheduler, 0), main.step_time)
        self.fleet, self.tick_s, self.route = fleet, tick_s, self._choose
        self.instances: dict[int, Instance] = {}  # by index of the replica
        self.held: list[tuple[SessionState, int]] = []  # turns without a replica, with their arrival
        self.lost = self.resumed = self.arrived = 0
        self.timeline: list[tuple[float, int, int, int]] = []  # time, turns in flight, replicas serving and starting
        self._clocks = {group.kind: StepClock(group.kind.step_time) for group in fleet.groups}
        self._follow(fleet.live)
        self._at(tick_s, self._tick)

    def _at(self, when_s: float, what: Callable[[], None]) -> None:
        self._arrive(what, round(when_s * TICKS_PER_S))  # type: ignore[arg-type]

    def _follow(self, instances: list[Instance]) -> None:
        """Act at the instants of an instance's life that are known."""
        for one in instances:
            if one.key not in self.instances:
                self.instances[one.key] = one
                self._at(one.ready_s, lambda one=one: self._ready(one))  # type: ignore[misc]
            if one.end_s < self.fleet.horizon_s + TAIL_S:
                self._at(one.end_s, lambda one=one: self._end(one))  # type: ignore[misc]

    def _send(self, state: Any, arrival: int | None = None) -> None:
        """Send a turn to a replica, or hold it until there is one; its wait counts from `arrival`."""
        if callable(state):
            state()
            return
        self.arrived += arrival is None
        if self._serving():
            super()._send(state, arrival)
        else:
            self.held.append((state, self.now if arrival is None else arrival))

    def _serving(self) -> list[Replica]:
        return [one for one in self.replicas if self.instances[one.index].serves(self.now / TICKS_PER_S)]

    def _choose(self, request: Request, last: Replica | None, now: int) -> Replica:
        """The replica of the session while it serves, else the least loaded by measured speed."""
        serving = self._serving()
        if last in serving and self.fleet.settings.sticky:
            return last
        return min(serving, key=lambda one: (one.load + 1) / self.instances[one.index].group.kind.rated_per_s)

    def _ready(self, one: Instance) -> None:
        if one.serves(self.now / TICKS_PER_S):
            kind = one.group.kind
            self.replicas.append(Replica(one.key, kind.scheduler, self._clocks[kind]))
            waiting, self.held = self.held, []
            for state, arrival in waiting:
                self._send(state, arrival)

    def _end(self, one: Instance) -> None:
        """The machine is gone: its turns are lost, or sent again from their start."""
        replica = next((replica for replica in self.replicas if replica.index == one.key), None)
        if replica is None or round(one.end_s * TICKS_PER_S) > self.now:
            return
        self.replicas.remove(replica)
        replica.version += 1
        for request in [one for one in self.in_flight.values() if one.owner.replica is replica]:
            del self.in_flight[request.key]
            if self.fleet.settings.resume:
                self.resumed += 1
                self._send(request.owner, request.times[0])
                continue
            self.lost += 1
            state, turns = request.owner, request.owner.session.turns
            state.turn, state.context = state.turn + 1, request.input_len  # the session goes on without this answer
            if state.turn == len(turns):
                self._end_session(state)
            else:
                self._pause(state)

    def _tick(self) -> None:
        now, serving = self.now / TICKS_PER_S, self._serving()
        usage = sum(one.scheduler.kv_cache_usage for one in serving) / max(1, len(serving))
        held = {self.instances[one.index]: one.load for one in self.replicas}
        waiting = len(self.held) or int(self.arrived > 0 and not sum(held.values()))  # a turn between two looks counts
        self.arrived = 0
        self.timeline.append((now, sum(held.values()), len(serving), len(self.fleet.live) - len(serving)))
        self._follow(self.fleet.step(now, held, waiting, usage))
        if now < self.fleet.horizon_s + TAIL_S:
            self._at(now + self.tick_s, self._tick)
