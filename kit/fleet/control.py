"""The machines of a fleet: launched, ready, reclaimed, drained, billed."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import numpy as np

from kit.fleet.capacity import Kind
from kit.prices import GpuPrice

TICK_S = 60.0  # how often the signal is looked at
TAIL_S = 7200.0  # how long after the horizon the fleet still runs for the turns of the last sessions


@dataclass(frozen=True, eq=False)
class Group:
    """Replicas bought alike: `floor` always, up to `ceiling` by the signal, or as many as spot lacks."""

    kind: Kind
    market: str
    price: GpuPrice
    floor: int = 0
    ceiling: int = 0
    fallback: bool = False


@dataclass(eq=False)
class Instance:
    """One replica's life in seconds; it takes turns from ready_s to drain_s and is paid until end_s."""

    key: int
    group: Group
    start_s: float
    ready_s: float
    drain_s: float = inf
    end_s: float = inf
    reclaimed: bool = False  # ends when its provider takes it back ..
    away_s: float = 0.0  # .. and has no other for this long

    def serves(self, now: float) -> bool:
        """Whether new turns go there."""
        return self.ready_s <= now < self.drain_s


class Fleet:
    """Instances of the groups; `step` is called every minute with what the replicas hold."""

    def __init__(self, groups: Sequence[Group], settings: Any, horizon_s: float, seed: int = 0) -> None:
        self.groups, self.settings, self.horizon_s, self.seed = groups, settings, horizon_s, seed
        self.live: list[Instance] = []
        self.ended: list[Instance] = []
        self._since: dict[tuple[Group, int], float] = {}
        self._away_until: dict[Group, float] = defaultdict(float)
        self._launched: Counter[Group] = Counter()
        for group in groups:
            for _ in range(group.floor):
                self._launch(group, 0.0).ready_s = 0.0

    def step(self, now: float, held: Mapping[Instance, float], waiting: float, kv_usage: float) -> list[Instance]:
        """Retire, launch and drain by the turns held by each, those without a replica, and the mean KV use.

        Returns the instances whose times were set or changed.
        """
        load_per_s = sum(one.group.kind.load(turns) for one, turns in held.items())
        load_per_s += self.groups[-1].kind.load(waiting)
        changed, drain_s = [], self.settings.drain_s
        for one in [one for one in self.live if one.end_s <= now]:
            self.live.remove(one)
            self.ended.append(one)
            self._away_until[one.group] = max(self._away_until[one.group], one.end_s + one.away_s)
        for group in self.groups:
            staying = [one for one in self.live if one.group is group and one.drain_s > now]
            more = self._wanted(group, now, load_per_s, kv_usage) - len(staying)
            if now >= self._away_until[group]:
                changed += [self._launch(group, now) for _ in range(more)]
            unpaid_s = (group.price.minimum_runtime_s or 0.0) - drain_s
            for one in [one for one in staying if now - one.start_s >= unpaid_s][: max(0, -more)]:
                if one.end_s > now + drain_s:
                    one.end_s, one.reclaimed, one.away_s = now + drain_s, False, 0.0
                one.drain_s = now
                changed.append(one)
        return changed

    def _wanted(self, group: Group, now: float, load_per_s: float, kv_usage: float) -> int:
        """Replicas that the group should have now; a changed wish of the signal waits for its delay."""
        serving = [one for one in self.live if one.serves(now)]
        if group.fallback:
            floor = sum(other.floor for other in self.groups if other.market == "spot")
            return floor - sum(one.group.market == "spot" for one in serving)
        if group.ceiling <= group.floor:
            return group.floor
        limit: float = self.settings.kv_cache_usage_limit
        need = load_per_s / self.settings.scale_to_fraction
        if kv_usage > limit:
            need = max(need, sum(one.group.kind.rated_per_s for one in serving) * kv_usage / limit)
        staying = Counter(one.group for one in self.live if one.drain_s > now)
        need -= sum(other.kind.rated_per_s * count for other, count in staying.items() if other is not group)
        have, least = staying[group], max(group.floor, ceil(need / group.kind.rated_per_s - 1e-9))
        wanted = int(min(group.ceiling, least))
        for sign, delay_s in ((1, self.settings.decision_delay_s), (-1, self.settings.cooldown_s)):
            if (wanted - have) * sign <= 0:
                self._since.pop((group, sign), None)
            elif now - self._since.setdefault((group, sign), now) < delay_s:
                return have
        return wanted

    def _launch(self, group: Group, now: float) -> Instance:
        rng = np.random.default_rng([self.seed, 5, self.groups.index(group), self._launched[group]])
        self._launched[group] += 1
        one = Instance(sum(self._launched.values()), group, now, now + rng.uniform(*group.kind.lead_s))
        if group.market == "spot":
            model, lasts, away = self.settings.interruption, rng.exponential(), rng.exponential()
            one.reclaimed, one.away_s, one.end_s = True, away * model["away_s"], now + lasts * model["mean_s"]
            one.drain_s = max(now, one.end_s - (group.price.interruption_notice_s or 0.0))
        self.live.append(one)
        return one

    def hours(self) -> dict[Group, float]:
        """Replica-hours billed by group: each machine to its end, at least for the provider's minimum."""
        hours = dict.fromkeys(self.groups, 0.0)
        for one in self.live + self.ended:
            minimum_s = (one.group.price.minimum_runtime_s or 0.0) if one.end_s < self.horizon_s else 0.0
            hours[one.group] += max(min(one.end_s, self.horizon_s) - one.start_s, minimum_s, 0.0) / 3600
        return hours
