"""Agent sessions on a cluster of engines in virtual time."""

from kit.simulator.loop import COLUMNS, Simulation, SimulationConfig
from kit.simulator.routing import ROUTINGS
from kit.simulator.steps import TICKS_PER_S, StepTime

__all__ = ["COLUMNS", "ROUTINGS", "TICKS_PER_S", "Simulation", "SimulationConfig", "StepTime"]
