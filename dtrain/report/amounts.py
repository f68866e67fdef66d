"""Amounts in words: bytes in powers of 1,024 (MiB), all else in powers of a thousand."""

from __future__ import annotations

PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
MIB, GIB = 1 << 20, 1 << 30  # bytes; columns that have one unit are in MiB
SIZES = ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB"))


def with_si_prefix(number: float, unit: str) -> str:
    """Return the number in its largest power of a thousand, with the unit."""
    for power, prefix in PREFIXES:
        if number >= power:
            return f"{number / power:,.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def in_bytes(number: float) -> str:
    """Return a number of bytes in words."""
    for size, unit in SIZES:
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:.0f} B"
