"""Bytes in words: powers of a thousand, everywhere. (torch's `bucket_mb` alone counts in MiB.)"""

from __future__ import annotations

SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
MB = 1e6  # bytes: the unit of columns that have one unit


def size(number: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, name in SIZES:
        if number >= unit:
            return f"{number / unit:,.1f} {name}" if unit > 1 else f"{number:.0f} {name}"
    return f"{number:.0f} B"
