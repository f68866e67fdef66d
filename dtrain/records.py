"""JSON as its standard has it: numbers that are not finite are written as words, and read as numbers again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JavaScript's and Python's float() know them


def dumps(value: Any, **options: Any) -> str:
    """As `json.dumps`."""
    return json.dumps(_worded(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """What `dumps` has written.

    Raises:
        ValueError: it is no JSON.
    """
    return _numbered(json.loads(text))


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one in each line; what a kill or a full disk has left of a line is none.

    A last line without its end may still grow.
    """
    found = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else ():
        try:
            record = loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _worded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, each in WORDS.items() if str(each) == str(float(value)))
    if isinstance(value, dict):
        return {key: _worded(each) for key, each in value.items()}
    return [_worded(each) for each in value] if isinstance(value, list | tuple) else value


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbered(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings within mappings as one, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
