"""JSON as its standard has it: numbers that are not finite are written as words, and read as
numbers again.

What is read may come from anybody: nothing that a file holds ends in anything but a ValueError.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DEEPEST, LARGEST, LINE = 64, 64 << 20, 1 << 20  # levels; bytes of a file, and of a line
# JavaScript's and Python's float() know them
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **options: Any) -> str:
    """As `json.dumps`."""
    return json.dumps(_worded(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """What `dumps` has written.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything of ours.
    """
    return numbered(parse(text))


def parse(text: str | bytes) -> Any:
    """The same as it stands, with no words for numbers."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if too_deep(value):
        raise ValueError(f"JSON that is nested deeper than {DEEPEST} levels")
    return value


def too_deep(value: Any) -> bool:
    """Is it nested deeper than `DEEPEST` levels?"""
    level = [value]
    for _ in range(DEEPEST):
        children = (
            e.values() if isinstance(e, dict) else e for e in level if isinstance(e, dict | list)
        )
        if not (level := [each for some in children for each in some]):
            return False
    return True


def read(file: Path) -> dict[str, Any]:
    """The object of a file.

    Raises:
        ValueError: it is no regular file, larger than any of ours, no JSON or no object; says which
            file.
        OSError: it cannot be read, or is not there.
    """
    check_regular(file)
    if (found := file.stat()).st_size > LARGEST:
        raise ValueError(f"{file} has {found.st_size:,} bytes: more than any such file")
    try:
        value = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not readable: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def figures(file: Path) -> dict[str, Any]:
    """The object of a file that `dumps` has written; raises as `read`."""
    found: dict[str, Any] = numbered(read(file))
    return found


def check_regular(file: Path) -> None:
    """Refuse what would be waited for, such as a pipe.

    Raises:
        ValueError: it is no regular file.
        OSError: it is not there.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is no regular file")


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one in each line; what a kill or a full disk has left of a
    line is none.

    A last line without its end may still grow.

    Raises:
        ValueError: it is no regular file.
    """
    if not file.exists():
        return
    check_regular(file)
    begins = True  # and is not what follows of one that is longer than any of ours
    with file.open("rb") as stream:
        while line := stream.readline(LINE):
            whole, begins = begins and line.endswith(b"\n"), line.endswith(b"\n")
            try:
                record = loads(line) if whole else None
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _worded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, each in WORDS.items() if str(each) == str(float(value)))
    if isinstance(value, dict):
        return {key: _worded(each) for key, each in value.items()}
    return [_worded(each) for each in value] if isinstance(value, list | tuple) else value


def numbered(value: Any) -> Any:
    """What was read, with numbers for the words that stand for some."""
    if isinstance(value, dict):
        return {key: numbered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numbered(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings within mappings as one, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return found
