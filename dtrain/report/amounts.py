"""Amounts in words: powers of a thousand, everywhere. (torch's `bucket_mb` alone counts in MiB.)"""

from __future__ import annotations

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
MB = 1e6  # bytes: the unit of columns that have one unit


def with_si_prefix(number: float, unit: str) -> str:
    """In the largest power of a thousand of which there is one."""
    for power, prefix in PREFIXES:
        if number >= power:
            return f"{number / power:,.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def in_bytes(number: float) -> str:
    """Bytes."""
    return with_si_prefix(number, "B")
