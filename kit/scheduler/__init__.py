"""The batching of an inference engine, on a clock that the caller owns."""

from kit.scheduler.core import Scheduler
from kit.scheduler.pool import OPEN_END, BlockPool, Path
from kit.scheduler.request import Batch, Request, SchedulerConfig

__all__ = ["OPEN_END", "Batch", "BlockPool", "Path", "Request", "Scheduler", "SchedulerConfig"]
