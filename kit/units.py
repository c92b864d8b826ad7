"""Constants and formatters. Inside the kit: seconds, bytes, tokens, fractions; at the edge: ms and GiB."""

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9  # decimal, only when quoting a vendor


def gib(size_bytes: float) -> float:
    """Size in GiB.

    >>> gib(85_899_345_920)
    80.0
    """
    return size_bytes / GIB


def format_bytes(size_bytes: float) -> str:
    """Size as text in the largest fitting binary unit.

    >>> format_bytes(16 * GIB), format_bytes(131_072)
    ('16.00 GiB', '128.00 KiB')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:,.2f} {name}"
    return f"{size_bytes:,.0f} B"


def format_seconds(duration_s: float) -> str:
    """Duration as text: ms below one second, minutes from two minutes on.

    >>> format_seconds(0.0421), format_seconds(3.5), format_seconds(208)
    ('42.1 ms', '3.5 s', '3.47 min')
    """
    if duration_s < 1:
        return f"{duration_s * 1e3:.3g} ms"
    if duration_s < 120:
        return f"{duration_s:.3g} s"
    return f"{duration_s / 60:.3g} min" if duration_s < 7200 else f"{duration_s / 3600:.3g} h"
