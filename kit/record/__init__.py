"""A transparent proxy that writes what agents ask of a server, as a workload that can be played again.

proxy (bytes both ways, a row per call) -> sessions (which session a call belongs to). The rows are
read by `kit.traces` as the format `recorded`, and by `kit.workload` as a workload.
"""

from kit.record.proxy import Recorder, upstream
from kit.record.sessions import Sessions

__all__ = ["Recorder", "Sessions", "upstream"]
