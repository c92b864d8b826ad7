"""Seconds of one engine step, and of what surrounds it; `fitted` says how good they are for a case."""

from kit.catalog import GpuSpec, ModelSpec
from kit.engine_config import ResolvedConfig
from kit.steptime.coefficients import Fitted, fitted
from kit.steptime.model import StepTime
from kit.steptime.work import Work, work

__all__ = ["Fitted", "StepTime", "Work", "fitted", "step_time", "work"]


def step_time(model: ModelSpec, gpu: GpuSpec, config: ResolvedConfig, basis: Fitted | None = None) -> StepTime:
    """Step times of one replica with the coefficients of data/coefficients, or of a calibration."""
    return StepTime(work(model, gpu, config), (basis or fitted(model, gpu, config)).coefficients)
