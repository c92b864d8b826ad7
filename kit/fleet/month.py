"""A month as a capacity model: one step per minute over the same machines and rules as the simulated day."""

from math import exp, inf

from kit.fleet.capacity import Floats
from kit.fleet.control import TICK_S, Fleet, Instance


def run_minutes(fleet: Fleet, turns_per_minute: Floats, slo_ttft_s: float | None, stay_s: float) -> dict[str, float]:
    """Turns completed, within the SLO, lost and sent again, from the turns that arrive in each minute.

    `stay_s` is how old a session is when it sends a turn, on average: new sessions go where there is room, others stay.
    """
    total = dict.fromkeys(("completed", "good", "lost", "resumed"), 0.0)
    backlog, shares = 0.0, dict[Instance, float]()
    kept = exp(-TICK_S / stay_s) if fleet.settings.sticky and stay_s else 0.0
    for minute, fresh in enumerate(turns_per_minute.tolist()):
        now = minute * TICK_S
        part = {one: (min(one.drain_s, now + TICK_S) - max(one.ready_s, now)) / TICK_S for one in fleet.live}
        speed = {one: share * one.group.kind.rated_per_s for one, share in part.items() if share > 0}
        limit = TICK_S * sum(part[one] * one.group.kind.turns_per_s[-1] for one in speed)
        stays = {one: kept * shares.get(one, 0.0) for one in speed}
        room = {one: max(0.0, share / sum(speed.values()) - stays[one]) for one, share in speed.items()}
        new = (1 - sum(stays.values())) / max(sum(room.values()), 1e-12)
        shares = {one: stays[one] + new * room[one] for one in speed}
        served = min(backlog + fresh, limit)
        good = usage = cut = 0.0
        in_flight = dict[Instance, float]()
        for one, share in shares.items():
            meets, in_flight[one], used = one.group.kind.at(served / TICK_S * share)
            good, usage = good + meets * share, usage + used / len(shares)
            if one.end_s < now + TICK_S:
                cut += in_flight[one] * max(0.0, 1 - (one.end_s - one.drain_s) / one.group.kind.e2el_s)
        late = backlog * TICK_S > limit * (inf if slo_ttft_s is None else slo_ttft_s)
        total["good"] += 0.0 if late else max(0.0, min(fresh, served) * good - cut)
        total["resumed" if fleet.settings.resume else "lost"] += cut  # what notice or draining was too short for
        total["completed"] += served - (0.0 if fleet.settings.resume else cut)
        backlog += fresh - served
        fleet.step(now + TICK_S, in_flight, backlog, usage)
    return total | {"unfinished": backlog}
