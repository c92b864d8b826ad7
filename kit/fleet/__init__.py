"""What traffic costs on machines that take time to come, are reclaimed, and are paid by the hour."""

from kit.fleet.study import Study, compare

__all__ = ["Study", "compare"]
