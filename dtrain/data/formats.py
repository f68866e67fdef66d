"""How files are read: text, JSON, JSON lines, CSV and Parquet, row by row.

All but Parquet are UTF-8, with or without its mark, perhaps compressed. What is surely no UTF-8
text is refused with the place of the first byte that tells: nothing is guessed.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

Rows = Iterator[tuple[str, dict[str, Any]]]  # where each stands, and its fields
CHUNK = 1 << 20  # bytes
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# of ISO-2022, which has Japanese, Korean or Chinese in ASCII
ESCAPE = re.compile(rb"\x1b(\$[@AB]|\$[()][A-D]|\(J)")
TEXT_OR_END = re.compile(r'"(?:[^"\\]|\\.)*"|}')  # of an object in JSON
ENDINGS = {
    "ndjson": "jsonl", "jsonlines": "jsonl", "jsonl": "jsonl", "json": "json", "csv": "csv",
    "tsv": "tsv", "tab": "tsv", "parquet": "parquet", "pq": "parquet",
}  # fmt: skip


def format_of(file: Path) -> str:
    """The format that a file's ending tells; without one of ours it is text."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSED else file
    return ENDINGS.get(name.suffix.lower().removeprefix("."), "text")


def rows_of(
    file: Path, format: str, field: str, wanted: Sequence[str] | None, left_out: Counter[str]
) -> Rows:
    """The rows of a file.

    Args:
        field: of a row that is a text alone.
        wanted: the only columns that are needed, if that is known.
        left_out: counts what cannot be read and is not `wanted`.

    Raises:
        ValueError: what cannot be read, with its place.
    """
    if format == "parquet":
        return _parquet(file, wanted, left_out)
    if format == "text":
        return _text(file, field)
    if format in ("csv", "tsv"):
        return _csv(file, "\t" if format == "tsv" else ",")
    return _json(file, field) if format == "json" else _jsonl(file, field)


def utf8(file: Path) -> IO[str]:
    """A file of UTF-8 text, opened; newlines of all kinds are \\n, a mark at its begin is left out.

    Raises:
        ValueError: it is something else.
    """
    open_it = COMPRESSED.get(file.suffix.lower(), open)
    try:
        with open_it(file, "rb") as stream:
            if found := _fault(stream):
                at, what = found
                raise ValueError(
                    f"{file} is not UTF-8 text (byte {at}){what}: convert it, or choose other files"
                )
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file} is damaged, or is not what its ending says: {error}") from None
    except OSError as error:
        if error.errno is None:  # what bz2 says of damage
            raise ValueError(
                f"{file} is damaged, or is not what its ending says: {error}"
            ) from None
        raise
    return open_it(file, "rt", encoding="utf-8-sig")


def _fault(stream: IO[bytes]) -> tuple[int, str] | None:
    """The first byte that tells that this is no UTF-8 text, and what it is, if that is certain."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    last = b""
    ascii_only = True
    escape = -1
    while True:
        chunk = stream.read(CHUNK)
        for name, marks in MARKS.items() if at == 0 else ():
            if chunk.startswith(marks):
                return 0, f": it begins with the mark of {name}"
        pending = len(decoder.getstate()[0])
        nul = chunk.find(b"\0")
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            if nul < 0 or error.start - pending < nul:
                return at + error.start - pending, ""
        if nul >= 0:
            return at + nul, ": a NUL is there, as in UTF-16 or in a binary file"
        ascii_only &= chunk.isascii()
        if ascii_only and escape < 0 and (found := ESCAPE.search(last + chunk)):
            escape = at - len(last) + found.start()
        if not chunk:
            return (escape, ": it is ISO-2022") if ascii_only and escape >= 0 else None
        at, last = at + len(chunk), chunk[-3:]


def _text(file: Path, field: str) -> Rows:
    with utf8(file) as stream:
        yield str(file), {field: stream.read()}


def _jsonl(file: Path, field: str) -> Rows:
    with utf8(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _row(parsed(line, where), field, where)


def _json(file: Path, field: str) -> Rows:
    """A list of rows, or one row; or JSON lines under another ending."""
    with utf8(file) as stream:
        before, first = next(((n, line) for n, line in enumerate(stream) if line.strip()), (0, ""))
        try:
            lines = isinstance(json.loads(first), dict | str | None)
        except (ValueError, RecursionError):
            lines = False
        if not lines:
            # the blank lines count, where a line is told
            text = "\n" * before + first + stream.read()
            whole = parsed(text, str(file)) if text.strip() else []
            for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
                yield f"{file}, row {number}", _row(value, field, f"{file}, row {number}")
            return
    yield from _jsonl(file, field)


def parsed(text: str, where: str) -> Any:
    """The value that a text of JSON holds.

    Args:
        where: the text's place. The line in it is told from the second one on.

    Raises:
        ValueError: it is no JSON, or an object has a key twice.
    """
    ended = 0  # objects

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal ended
        ended += 1
        if len(made := dict(pairs)) < len(pairs):
            raise _Twice(
                next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            )
        return made

    try:
        return json.loads(text, object_pairs_hook=unique)
    except _Twice as twice:
        ends = (found for found in TEXT_OR_END.finditer(text) if found[0] == "}")
        before = text.count("\n", 0, next(islice(ends, ended - 1, None)).start())
        line = f", line {before + 1}" if before else ""
        key = str(twice)[:80]
        raise ValueError(
            f"{where}{line}: the key {key!r} stands twice in an object: name them apart"
        ) from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python takes
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None


class _Twice(Exception):
    """An object of JSON has this key more than once."""


def _row(value: Any, field: str, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if value is None or isinstance(value, str):
        return {field: value}
    raise ValueError(
        f"{where} is {type(value).__name__}: a row is an object with fields, or a text"
    )


def _csv(file: Path, delimiter: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own is 128 kB
    with utf8(file) as stream:
        rows = csv.DictReader(stream, strict=True, delimiter=delimiter)
        try:
            names = Counter(rows.fieldnames or ())
            if twice := [name for name, number in names.items() if number > 1]:
                raise ValueError(
                    f"{file}, line 1: {names[twice[0]]} columns are named {twice[0]!r}: name "
                    f"them apart"
                )
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, line {rows.line_num}: not {len(names)} columns as its head"
                    )
                yield f"{file}, line {rows.line_num}", dict(row)
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def _parquet(file: Path, wanted: Sequence[str] | None, left_out: Counter[str]) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("Parquet files need `pyarrow`: pip install 'dtrain[parquet]'") from None
    unread: set[str] = set()
    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
        if twice := [name for name, number in Counter(names).items() if number > 1]:
            raise ValueError(
                f"{file}: {names.count(twice[0])} columns are named {twice[0]!r}: name them apart"
            )
        if not names:  # whoever asks is told what there is
            yield f"{file}, row 0", dict.fromkeys(table.schema_arrow.names)
        for batch in table.iter_batches(columns=names) if names else ():
            columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    columns[name] = column.to_pylist()
                except (ArrowException, ValueError, OverflowError) as error:
                    if wanted:
                        raise ValueError(
                            f"{file}: column {name!r} is {column.type}, not text ({error})"
                        ) from None
                    unread.add(name)
            for index in range(batch.num_rows):
                row = {
                    name: values[index] for name, values in columns.items() if name not in unread
                }
                yield f"{file}, row {number}", row
                number += 1
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        line = str(error).splitlines()[0]
        raise ValueError(f"{file} is not a Parquet file, or is damaged ({line})") from None
    if unread:
        left_out["columns of a Parquet file that have no value in Python"] += len(unread)
