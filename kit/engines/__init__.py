"""Real engines: started from data/engines, watched until healthy, stopped with everything they started."""

from kit.engines.control import Engine, EngineFailed, start
from kit.engines.launch import Launch, launch
from kit.engines.lint import lint_metrics

__all__ = ["Engine", "EngineFailed", "Launch", "launch", "lint_metrics", "start"]
