"""The small values that the memory rules hand to each other."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One modelled quantity in bytes with the half width of its 90 % interval."""

    size_bytes: float
    half_width_bytes: float
