"""From an SLO to confirmed engine limits in few starts: levels of load on one start, then starts that confirm."""

from kit.tune.levels import Boot, Goal, Level, Machine, Result, Store, judge
from kit.tune.load import Offer
from kit.tune.search import Setup, tune
from kit.tune.virtual import VirtualMachine, expected

__all__ = [
    "Boot", "Goal", "Level", "Machine", "Offer", "Result", "Setup", "Store", "VirtualMachine",
    "expected", "judge", "tune",
]  # fmt: skip
