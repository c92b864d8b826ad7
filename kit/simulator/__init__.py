"""Agent sessions on a cluster of engines in virtual time."""

from kit.scheduler import StepTime
from kit.simulator.loop import COLUMNS, Simulation, SimulationConfig
from kit.simulator.routing import ROUTINGS
from kit.simulator.steps import TICKS_PER_S
from kit.simulator.study import Load, replica, study

__all__ = [
    "COLUMNS", "ROUTINGS", "TICKS_PER_S", "Load", "Simulation", "SimulationConfig", "StepTime", "replica", "study",
]  # fmt: skip
