"""The batching of an inference engine, on a clock that the caller owns."""

from kit.scheduler.core import Scheduler
from kit.scheduler.engines import scheduler_config
from kit.scheduler.pool import OPEN_END, BlockPool, Path, lru_hit_fraction
from kit.scheduler.request import Batch, Request, SchedulerConfig, StepTime

__all__ = [
    "OPEN_END", "Batch", "BlockPool", "Path", "Request", "Scheduler", "SchedulerConfig", "StepTime",
    "lru_hit_fraction", "scheduler_config",
]  # fmt: skip
