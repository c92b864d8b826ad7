"""The search: closed loops bracket the limit, capped open loops find the best value, more starts confirm it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from typing import Any

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import EngineConfig, resolve
from kit.memory import plan
from kit.tune.companions import companions
from kit.tune.levels import Boot, Goal, Level, Machine, Result, Store
from kit.tune.limits import Limit, limits

SEED, HELD_OUT = 1, 2  # of the loads that are compared, and of one that only confirms
AGAIN = 0.95  # of a goodput that a start of its own must show again
KV_FULL, PREEMPTED = 0.98, 0.02  # of the pool; preemptions more per turn
GAIN = 1.05  # in throughput, for which twice the turns are tried
REASONS = {
    "tpot": "more turns at once make tokens later than the TPOT limit, fewer let turns wait",
    "ttft": "fewer turns at once let turns wait beyond the TTFT limit, more gain nothing",
    "kv_cache": "the KV pool holds no more turns at once, fewer let turns wait",
    "load": "every value tried serves this load alike; the closed loops' limit protects the engine from more",
}
FLAT, FEW = 0.01, 1.5  # goodputs this near are one, or within so many turns
NEAR = 0.9  # of the best goodput: worth a start to know better
MOST_LEVELS = 11  # open loops of the search
FINEST, BRACKET = 1.1, 1.44  # ratio of values that are not told apart; of the closed loops around the limit
GENEROUS, LEAST_FIRST = 4, 64  # limit of the first start: so many times what is expected, and at least
UNKNOWN, MOST_SEQS = 32, 1024  # where nothing is expected, and beyond which nothing is tried
HOPELESS = 0.5  # fewer than this within the limits, one turn alone: nothing to tune


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tuned; `expected` is where the search begins, no more."""

    model: ModelSpec
    gpu: GpuSpec
    config: EngineConfig
    expected: int | None = None  # max_num_seqs that the modelled machine would want

    def most(self) -> int:
        """Turns that the engine could run at once: its token budget holds one for each."""
        return min(MOST_SEQS, resolve(self.config, self.model, self.gpu).max_num_batched_tokens)

    def pool_tokens(self, max_num_seqs: int) -> int:
        """KV pool with that limit, modelled, in tokens."""
        return plan(self.model, self.gpu, replace(self.config, max_num_seqs=max_num_seqs)).kv_cache_tokens()


def tune(
    machine: Machine, setup: Setup, goal: Goal, store: Store, max_boots: int = 3,
    progress: Callable[[Boot | Level], None] = lambda one: None,
) -> Result:  # fmt: skip
    """The best max_num_seqs for the goal, measured on one start and confirmed on others; or why there is none."""
    return Tuner(machine, setup, goal, store, max_boots, progress).run()


@dataclass
class Tuner:
    """One tuning under way."""

    machine: Machine
    setup: Setup
    goal: Goal
    store: Store
    max_boots: int
    progress: Callable[[Boot | Level], None]
    running: int = field(default=0, init=False)  # index of the start whose engine is up now
    expected: int = field(default=UNKNOWN, init=False)

    def run(self) -> Result:
        """Levels and starts until the answer stands, or says why it does not."""
        self.expected = self.setup.expected or UNKNOWN
        first = self.start(min(self.setup.most(), max(LEAST_FIRST, GENEROUS * self.expected)))
        alone = self.level(first, "closed", 1)
        if alone.slo_attainment_fraction < HOPELESS:
            return self.infeasible(alone)
        found = limits(self.bracket(first), self.goal, first, self.pool_tokens(first))
        begin = max(1, min([first.max_num_seqs, *(limit.at for limit in found if limit.at)]))
        caps, left = self.search(first, begin), self.max_boots - 1
        if nearest(caps, begin) == first.max_num_seqs < self.setup.most() and left > 1:  # more may be better still
            first, left = self.start(min(self.setup.most(), GENEROUS * first.max_num_seqs)), left - 1
            caps |= self.search(first, max(caps))
        best = choose(caps, begin)
        caps[best] = self.level(first, "open", best)
        tried = {cap: self.confirm(cap) for cap in self.worth_a_start(caps, best, left)}
        return self.result(found, caps, best, tried)

    def start(self, max_num_seqs: int) -> Boot:
        """The start with this limit: the one kept, or a new one."""
        flags = {"max_num_seqs": max_num_seqs}
        kept = next((boot for boot in self.store.boots if boot.flags == flags), None)
        return kept or self.up(Boot(len(self.store.boots) + 1, flags, max_num_seqs))

    def up(self, boot: Boot) -> Boot:
        """The same start with its engine running."""
        if self.running == boot.index:
            return boot
        started = self.machine.boot(boot.flags, boot.index)
        self.running = boot.index
        if boot.index > len(self.store.boots):
            self.store.add(started)
            self.progress(started)
        return started

    def level(self, boot: Boot, kind: str, concurrency: int | None, seed: int = SEED) -> Level:
        """A level of that start: the one kept, or measured now and kept."""
        if (kept := self.store.find(boot.index, kind, concurrency, seed)) is not None:
            return kept
        boot = self.up(boot)
        if kind == "closed" and concurrency:
            one = self.machine.closed_loop(boot, concurrency, seed, min(max(10, 6 * concurrency), 300))
        else:
            one = self.machine.open_loop(boot, seed, concurrency)
        self.store.add(one)
        self.progress(one)
        return one

    def bracket(self, boot: Boot) -> list[Level]:
        """Closed loops around the point where the goal is lost, or the throughput stops to grow."""
        seen: dict[int, Level] = {}

        def carries(turns: int) -> bool:
            seen[turns] = self.level(boot, "closed", turns)
            return seen[turns].slo_attainment_fraction >= self.goal.attainment_fraction

        most, now = boot.max_num_seqs, min(self.expected, boot.max_num_seqs)
        carries(1)
        rising = carries(now)
        while now < most if rising else now > 1:
            before, now = now, min(most, 2 * now) if rising else now // 2
            if carries(now) != rising or (rising and seen[now].requests_per_s < GAIN * seen[before].requests_per_s):
                break
        while True:
            good = max((n for n in seen if carries(n)), default=1)
            bad = min((n for n in seen if n > good), default=good)
            middle = round(sqrt(good * bad))
            if bad <= BRACKET * good or middle in seen:
                return [seen[n] for n in sorted(seen)]
            carries(middle)

    def search(self, boot: Boot, begin: int) -> dict[int, Level]:
        """Open loops by most turns let in: beside `begin`, and then in the gaps around the best; all on one start.

        A client that lets in at most n turns shows what the engine would do with max_num_seqs n, queue included.
        """
        caps: dict[int, Level] = {}

        def measure(cap: float) -> bool:
            cap = min(boot.max_num_seqs, max(1, round(cap)))
            if any(max(cap, n) < FINEST * min(cap, n) for n in caps) or len(caps) >= MOST_LEVELS:
                return False
            caps[cap] = self.level(boot, "open", cap)
            return True

        for cap in (begin, sqrt(2) * begin, 2 * begin, boot.max_num_seqs):
            measure(cap)
        while not flat(caps) and any([measure(sqrt(a * b)) for a, b in gaps(caps, begin)]):  # noqa: C419
            pass
        return caps

    def worth_a_start(self, caps: dict[int, Level], best: int, left: int) -> list[int]:
        """The best value, and beside it the neighbour that is a little worse: its own start, or another load, may tell.

        Also the first start's own limit, which needs no start.
        """
        if not left or flat(caps):
            return [best][:left]
        near, same = NEAR * caps[best].goodput_requests_per_s, alike(caps)
        values, own = [n for n in sorted(caps) if caps[n].goodput_requests_per_s > near], max(caps)
        at = values.index(best)
        beside = [n for n in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2]) if n not in (own, *same)]
        beside.sort(key=lambda n: -caps[n].goodput_requests_per_s)
        return [n for n in values if n == own] + [n for n in (best, *beside) if n != own][:left]

    def confirm(self, max_num_seqs: int) -> list[Level]:
        """Open loops without a cap on a start with that limit: the load of the search, and one never seen."""
        boot = self.start(max_num_seqs)
        return [self.level(boot, "open", None, seed) for seed in (SEED, HELD_OUT)]

    def pool_tokens(self, boot: Boot) -> Callable[[int], int | None]:
        """The pool that this start printed, changed as modelled for another limit."""
        held, model = boot.kv_cache_tokens, self.setup.pool_tokens
        return lambda n: held and held + model(n) - model(boot.max_num_seqs)

    def infeasible(self, alone: Level) -> Result:
        """No value helps where one turn alone is too slow."""
        text, told, goal = "{} limit {:g} s: one turn alone takes {:.3g} s at the median", list[str](), self.goal
        for name, limit, seen in (("TTFT", goal.slo_ttft_s, alone.ttft_s), ("TPOT", goal.slo_tpot_s, alone.tpot_s)):
            if (took := seen["p50"]) and took > limit:
                told.append(text.format(name, limit, took))
        met = alone.slo_attainment_fraction
        told.append(f"{met:.0%} of the turns meet the limits when each has the engine for itself")
        return Result("infeasible", slo_attainment_fraction=met, notes=tuple(told), **self.counted())

    def counted(self) -> dict[str, Any]:
        """What every result says of its making."""
        evidence = [asdict(one) for one in self.store.levels]
        return {"boots": len(self.store.boots), "evidence": evidence, "predicted_max_num_seqs": self.setup.expected}

    def result(self, found: list[Limit], caps: dict[int, Level], best: int, tried: dict[int, list[Level]]) -> Result:
        """The answer: the value chosen, unless a start beside it is plainly better."""
        for other in tried:
            if rate(tried[other]) > (1 + FLAT) * rate(tried[best]):
                best = other
        told, before, setup = tried.get(best, [caps[best]]), caps[best].goodput_requests_per_s, self.setup
        met = sum(one.slo_attainment_fraction * one.n for one in told) / sum(one.n for one in told)
        seen, wanted = told[0].goodput_requests_per_s, self.goal.attainment_fraction
        confirmed, notes = best in tried and seen >= AGAIN * before, []
        if best not in tried:
            notes.append(f"max_num_seqs {best} was not confirmed by a start of its own")
        elif not confirmed:
            notes.append(f"max_num_seqs {best} gave {seen:.3g} good turns/s on its own start, {before:.3g} before")
        if met < wanted:
            notes.append(f"{met:.0%} of the turns meet the limits, not {wanted:.0%}: no max_num_seqs carries this load")
        values, arguments, reasons = companions(
            setup.model, setup.gpu, setup.config, self.goal, best, self.store.levels
        )
        limited_by = decides(caps, best)
        return Result(
            "resolved" if confirmed else "unresolved", values, arguments,
            {"max_num_seqs": REASONS[limited_by]} | reasons, rate(told), met, limited_by,
            {one.name: one.at for one in found},
            {one.name: one.interval for one in found}, confirmed, tuple(notes), **self.counted(),
        )  # fmt: skip


def rate(levels: Sequence[Level]) -> float:
    """Mean goodput, turns per second."""
    return sum(one.goodput_requests_per_s for one in levels) / len(levels)


def alike(caps: Mapping[int, Level]) -> list[int]:
    """The values with the highest goodput, ascending; one turn makes no difference."""
    best = max(caps.values(), key=lambda one: one.goodput_requests_per_s)
    least = min((1 - FLAT) * best.goodput_requests_per_s, best.goodput_requests_per_s - FEW / best.duration_s)
    return sorted(n for n, one in caps.items() if one.goodput_requests_per_s >= least)


def flat(caps: Mapping[int, Level]) -> bool:
    """Whether all these values serve the load alike."""
    return len(alike(caps)) == len(caps)


def nearest(caps: Mapping[int, Level], begin: int) -> int:
    """Of the best values the one nearest to `begin`, the closed loops' limit."""
    return min(alike(caps), key=lambda n: max(n, begin) / min(n, begin))


def choose(caps: Mapping[int, Level], begin: int) -> int:
    """The value to take: the nearest, or one above where too few would begin right below it.

    On that side goodput falls steeply, and another hour's load needs a few more.
    """
    best, (lowest, *above) = nearest(caps, begin), alike(caps)
    return best if best > lowest or not above else min(above[0], round(sqrt(2) * best))


def gaps(caps: Mapping[int, Level], begin: int) -> list[tuple[int, float]]:
    """The best value with its neighbours that are worse and still far: between them a better one may lie."""
    values, best, same = sorted(caps), nearest(caps, begin), alike(caps)
    at = values.index(best)
    around = [values[at - 1] if at else best / 2, *values[at + 1 : at + 2]]
    return [(best, other) for other in around if other not in same and max(best / other, other / best) > FINEST**2]


def decides(caps: Mapping[int, Level], best: int) -> str:
    """What more turns at once would cost, or, where they cost nothing, what fewer would."""
    if flat(caps):
        return "load"
    now = caps[best]
    worse = [caps[n] for n in sorted(caps) if n > best and n not in alike(caps)]
    if not worse:
        return "kv_cache" if (now.kv_cache_usage_max or 0.0) > KV_FULL else "ttft"
    if (worse[0].preemptions or 0) - (now.preemptions or 0) > PREEMPTED * worse[0].n:
        return "kv_cache"
    lost_tpot = now.tpot_attainment_fraction - worse[0].tpot_attainment_fraction
    lost_ttft = now.ttft_attainment_fraction - worse[0].ttft_attainment_fraction
    return "tpot" if lost_tpot >= lost_ttft else "ttft"
