"""Amounts in words, in powers of a thousand. (Only torch's `bucket_mb` counts in MiB.)"""

from __future__ import annotations

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
MB = 1e6  # bytes: the unit of columns that have one unit


def with_si_prefix(number: float, unit: str) -> str:
    """Return the number in its largest power of a thousand, with the unit."""
    for power, prefix in PREFIXES:
        if number >= power:
            return f"{number / power:,.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def in_bytes(number: float) -> str:
    """Return a number of bytes in words."""
    return with_si_prefix(number, "B")
