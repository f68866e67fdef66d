"""Read and write standard JSON, with words in place of numbers that are not finite.

What is read may come from anybody: whatever a file holds, only a ValueError is raised.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

DEEPEST, LARGEST, LINE = 64, 64 << 20, 1 << 20  # levels; bytes of a file, and of a line
# JavaScript and Python's float() know these words.
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **options: Any) -> str:
    """Do as `json.dumps`, with words for numbers that are not finite."""
    return json.dumps(_with_words(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return what `dumps` has written.

    Raises:
        ValueError: it is no JSON, or nested deeper than `DEEPEST` levels.
    """
    return numbered(parse(text))


def parse(text: str | bytes) -> Any:
    """Do as `loads`, and leave words for numbers as they are."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if too_deep(value):
        raise ValueError(f"JSON that is nested deeper than {DEEPEST} levels")
    return value


def too_deep(value: Any) -> bool:
    """Return whether a value is nested deeper than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        parents = [each for each in level if isinstance(each, dict | list)]
        children = [each.values() if isinstance(each, dict) else each for each in parents]
        if not (level := [*chain(*children)]):
            return False
    return True


def read(file: Path) -> dict[str, Any]:
    """Return the object of a file.

    Raises:
        ValueError: it is no regular file, larger than `LARGEST`, no JSON or no object; names the
            file.
        OSError: it cannot be read, or is not there.
    """
    check_regular(file)
    if (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"{file} has {size:,} bytes: more than any such file")
    try:
        value = parse(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not readable: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def figures(file: Path) -> dict[str, Any]:
    """Return the object of a file that `dumps` has written; raises as `read`."""
    value: dict[str, Any] = numbered(read(file))
    return value


def check_regular(file: Path) -> None:
    """Refuse a pipe and the like, from which reading might never return.

    Raises:
        ValueError: it is no regular file.
        OSError: it is not there.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is no regular file")


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that has one in each line.

    Lines that a kill or a full disk has cut are skipped; so is a last line without an end, which
    may still grow.

    Raises:
        ValueError: it is no regular file.
    """
    if not file.exists():
        return
    check_regular(file)
    begins = True  # not in the middle of a line that is longer than `LINE`
    with file.open("rb") as stream:
        while line := stream.readline(LINE):
            whole, begins = begins and line.endswith(b"\n"), line.endswith(b"\n")
            try:
                record = loads(line) if whole else None
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _with_words(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, each in WORDS.items() if str(each) == str(float(value)))
    if isinstance(value, dict):
        return {key: _with_words(each) for key, each in value.items()}
    return [_with_words(each) for each in value] if isinstance(value, list | tuple) else value


def numbered(value: Any) -> Any:
    """Return what was read, with numbers for the words that stand for them."""
    if isinstance(value, dict):
        return {key: numbered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numbered(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return mappings within mappings as one, by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values
