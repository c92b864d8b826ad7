"""When sessions start over the whole period, and what one asks for."""

from dataclasses import replace
from itertools import takewhile
from math import ceil
from typing import Any

import numpy as np

from kit.fleet.minutes import Calls
from kit.scenario import Scenario
from kit.workload import Session, load

DAY_S = 86_400.0
SAMPLE = 2000
Tier = tuple[float, float]  # a share of the sessions, from and to


def each_call(session: Session, paused_s: float = 0.0, number: int = 0) -> list[tuple[float, int, int, int, int]]:
    """Pauses and turns before each turn of a session and of its sub-agents, its prompt, answer and new tokens."""
    made, new = list[tuple[float, int, int, int, int]](), session.shared_prefix_tokens
    for turn, prompt in zip(session.turns, session.input_lens(), strict=True):
        made.append((paused_s, number, prompt, turn.output_len, new + turn.new_tokens))
        new, number = 0, number + 1
        below = [each_call(child, paused_s + child.arrival_s, number) for child in turn.children]
        if below:  # the join: the sub-agent with most pauses and turns, a turn counted as a second
            paused_s, number = max(((calls[-1][0], calls[-1][1] + 1) for calls in below), key=sum)
        made += [call for calls in below for call in calls]
        paused_s += turn.pause_after_s
    return made


class Traffic:
    """The workload's arrivals, scaled to the scenario's conversations, with the daily bursts of its fleet section."""

    def __init__(self, case: Scenario, fleet: Any, days: float, seed: int) -> None:
        self.workload, self.seed = load(case.workload), seed
        daily = fleet.sessions_per_day or case.conversations_per_day
        arrivals = self.workload.arrivals.within(days * DAY_S, daily and round(daily * days))
        starts = list(takewhile(lambda at: at < days * DAY_S, arrivals.times(np.random.default_rng([seed, 0]))))
        for burst in fleet.bursts:
            over_s = np.linspace(0, burst.get("over_s", 0.0), int(burst["sessions"]), endpoint=False)
            starts += [day * DAY_S + burst["at_s"] + at for day in range(ceil(days)) for at in over_s.tolist()]
        self.starts_s, rng = np.sort(np.array(starts)), np.random.default_rng([seed, 6])
        self._tier, self._like = rng.random(len(starts)), rng.integers(SAMPLE, size=len(starts))
        draw = self.workload.session.draw
        self._sample = sample = [draw(np.random.default_rng([seed, 7, key]), key, 0.0) for key in range(SAMPLE)]
        played = [each_call(one) for one in sample]
        self._turns = np.array([len(calls) for calls in played])
        rows = np.array([call for calls in played for call in calls])
        self._paused_s, self._number, prompt, answer, new = rows.T  # pauses and turns before a turn; tokens
        self.tokens = prompt + answer / 2  # held by a turn, on average
        self.stay_s = float(self._paused_s.mean())  # age of a session at a turn
        self.prompt_tokens, self.output_tokens, fresh = (float(x.sum()) / SAMPLE for x in (prompt, answer, new))
        self.resent_tokens = self.prompt_tokens - fresh  # these of one session, its sub-agents' included

    def _keys(self, first_s: float, last_s: float, tier: Tier) -> list[int]:
        inside = (self.starts_s >= first_s) & (self.starts_s < last_s)
        return [int(key) for key in np.flatnonzero(inside & (self._tier >= tier[0]) & (self._tier < tier[1]))]

    def sessions(self, first_s: float, last_s: float, tier: Tier = (0, 1)) -> list[Session]:
        """The sessions that start in that window, their clock from its beginning."""
        return [
            replace(self._sample[self._like[key]], key=key, arrival_s=float(self.starts_s[key]) - first_s)
            for key in self._keys(first_s, last_s, tier)
        ]

    def calls(self, first_s: float, last_s: float, tier: Tier = (0, 1), turn_s: float = 0.0) -> Calls:
        """Turns by time: seconds from the window's start if each takes turn_s, session, and the turn of the sample."""
        keys = self._keys(first_s, last_s, tier)
        turns = self._turns[self._like[keys]]
        who = np.repeat(np.arange(len(keys)), turns)
        first = (np.cumsum(self._turns) - self._turns)[self._like[keys]] - (np.cumsum(turns) - turns)
        like = first[who] + np.arange(len(who))
        at_s = (self.starts_s[keys] - first_s)[who] + self._paused_s[like] + turn_s * self._number[like]
        order = np.argsort(at_s, kind="stable")
        return at_s[order], who[order], like[order]
