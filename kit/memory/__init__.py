"""What an engine's start-up log will say, and how many sessions that holds."""

from kit.memory.plan import MemoryPlan, plan

__all__ = ["MemoryPlan", "plan"]
