"""Most turns at once by each limit, from closed loops: TTFT and TPOT, the KV pool, the knee of the throughput."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from kit.metrics import Floats
from kit.tune.levels import Boot, Goal, Level

POOL_USED = 0.95  # of the KV pool: the rest is for contexts that grow together
KNEE = 0.95  # of the highest throughput
DRAWS = 200


@dataclass(frozen=True, slots=True)
class Limit:
    """Most turns at once that this allows; None: not reached by what was measured."""

    name: str
    at: int | None
    interval: tuple[int, int] | None = None  # 90 % by the turns counted, and at least between two levels measured


def limits(levels: Sequence[Level], goal: Goal, boot: Boot, pool_tokens: Callable[[int], int | None]) -> list[Limit]:
    """Limits by tpot, ttft, kv_cache and knee; `levels` ascend in concurrency."""
    n = np.array([one.limit for one in levels], float)
    counts = np.array([one.n for one in levels])
    found = []
    for name in ("tpot", "ttft"):
        met = np.array([getattr(one, f"{name}_attainment_fraction") for one in levels])
        at, rng = crossing(n, met, counts, goal.attainment_fraction), np.random.default_rng(0)
        draws = [
            crossing(n, rng.binomial(counts, met) / counts, counts, goal.attainment_fraction) for _ in range(DRAWS)
        ]
        low, high = np.quantile([x or boot.max_num_seqs for x in draws], (0.05, 0.95))
        kept, lost = n[met >= goal.attainment_fraction], n[met < goal.attainment_fraction]  # not told apart in between
        span = int(min(low, kept.max(initial=1))), int(max(high, lost.min(initial=boot.max_num_seqs)))
        found.append(Limit(name, at, span if at else None))
    return [*found, Limit("kv_cache", _kv_cache(levels, boot, pool_tokens)), Limit("knee", _knee(levels))]


def crossing(n: Floats, met: Floats, counts: Floats, goal: float) -> int | None:
    """Largest n at which a falling fit of the fractions `met` still reaches the goal; None: it does everywhere.

    >>> crossing(np.array([1.0, 4.0, 16.0]), np.array([1.0, 1.0, 0.5]), np.array([9, 9, 9]), 0.75)
    8
    """
    fit = isotonic_regression(met, weights=counts, increasing=False).x
    below = np.flatnonzero(fit < goal)
    if not len(below):
        return None
    if below[0] == 0:
        return 1
    left, right = below[0] - 1, below[0]
    share = (fit[left] - goal) / (fit[left] - fit[right])
    return max(1, int(np.exp(np.log(n[left]) + share * np.log(n[right] / n[left])) + 1e-9))


def _kv_cache(levels: Sequence[Level], boot: Boot, pool_tokens: Callable[[int], int | None]) -> int | None:
    """Turns whose KV fills the pool, what they share counted once: a line through tokens held by turns running."""
    rows = [(x.running_mean, x.kv_cache_usage_mean) for x in levels if x.running_mean and x.kv_cache_usage_mean]
    if not rows or not boot.kv_cache_tokens:
        return None
    running, used = np.array(rows).T
    held = used * boot.kv_cache_tokens
    each = float(np.polyfit(running, held, 1)[0]) if np.ptp(running) > 1 else float((held / running).mean())
    each = max(each, 1.0)
    shared = max(0.0, float((held - each * running).mean()))
    at = boot.max_num_seqs
    for _ in range(4):  # the flag itself takes memory from the pool
        at = max(1, int((POOL_USED * (pool_tokens(at) or boot.kv_cache_tokens) - shared) / each))
    return at


def _knee(levels: Sequence[Level]) -> int | None:
    """Fewest turns with nearly all of the highest throughput; None where it still grows at the last level."""
    rates = np.maximum.accumulate([one.requests_per_s for one in levels])
    if rates[-1] > rates[:-1].max(initial=0.0) / KNEE:
        return None
    return levels[int(np.argmax(rates >= KNEE * rates[-1]))].limit
