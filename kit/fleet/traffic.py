"""When sessions start over the whole period, and what one asks for."""

from itertools import takewhile
from math import ceil
from typing import Any

import numpy as np

from kit.fleet.capacity import Floats
from kit.fleet.control import TICK_S
from kit.fleet.day import TAIL_S
from kit.scenario import Scenario
from kit.workload import Session, load

DAY_S = 86_400.0
SAMPLE = 2000
Tier = tuple[float, float]  # a share of the sessions, from and to


class Traffic:
    """The workload's arrivals, scaled to the scenario's conversations, with the daily bursts of its fleet section."""

    def __init__(self, case: Scenario, fleet: Any, days: float, seed: int) -> None:
        self.workload, self.seed = load(case.workload), seed
        daily = fleet.sessions_per_day or case.conversations_per_day
        arrivals = self.workload.arrivals.within(days * DAY_S, daily and round(daily * days))
        starts = list(takewhile(lambda at: at < days * DAY_S, arrivals.times(np.random.default_rng([seed, 0]))))
        for burst in fleet.bursts:
            over_s = np.linspace(0, burst.get("over_s", 0.0), burst["sessions"], endpoint=False)
            starts += [day * DAY_S + burst["at_s"] + at for day in range(ceil(days)) for at in over_s.tolist()]
        self.starts_s, rng = np.sort(np.array(starts)), np.random.default_rng([seed, 6])
        self._tier, self._like = rng.random(len(starts)), rng.integers(SAMPLE, size=len(starts))
        sample = [self.workload.session.draw(np.random.default_rng([seed, 7, key]), key, 0.0) for key in range(SAMPLE)]
        self._offsets = [np.cumsum([0.0, *(turn.pause_after_s for turn in one.turns[:-1])]) for one in sample]
        self.stay_s = float(np.mean(np.concatenate(self._offsets)))  # age of a session at a turn
        self.prompt_tokens = float(np.mean([sum(one.input_lens()) for one in sample]))  # of one session
        self.output_tokens = float(np.mean([sum(turn.output_len for turn in one.turns) for one in sample]))
        new = [one.shared_prefix_tokens + sum(turn.new_tokens for turn in one.turns) for one in sample]
        self.resent_tokens = self.prompt_tokens - float(np.mean(new))

    def _keys(self, first_s: float, last_s: float, tier: Tier) -> list[int]:
        at, share = self.starts_s, self._tier
        inside = (at >= first_s) & (at < last_s) & (share >= tier[0]) & (share < tier[1])
        return [int(key) for key in np.flatnonzero(inside)]

    def sessions(self, first_s: float, last_s: float, tier: Tier = (0, 1)) -> list[Session]:
        """The sessions that start in that window, their clock from its beginning."""
        keys, draw = self._keys(first_s, last_s, tier), self.workload.session.draw
        return [draw(np.random.default_rng([self.seed, 1, k]), k, float(self.starts_s[k]) - first_s) for k in keys]

    def turns(self, first_s: float, last_s: float, tier: Tier = (0, 1)) -> Floats:
        """Turns of each minute, those after the window included; their times in a session are drawn from a sample."""
        at = [self.starts_s[key] + self._offsets[self._like[key]] for key in self._keys(first_s, last_s, tier)]
        edges = np.arange(first_s, last_s + TAIL_S + TICK_S, TICK_S)
        return np.histogram(np.concatenate(at).clip(max=edges[-1]) if at else [], edges)[0].astype(float)
