"""A load generator whose clock is right at 10,000 streams, and that says when it is not.

plan (what is sent when) -> run (parent: probe, workers, verdict) -> worker (process) -> driver
(schedule) -> connection (bytes with kernel arrival times) -> recorder (parses later, writes).
"""

from kit.loadgen.plan import Level, Target, fixed_sessions, level
from kit.loadgen.run import Options, measure

__all__ = ["Level", "Options", "Target", "fixed_sessions", "level", "measure"]
