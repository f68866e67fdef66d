"""Read files of text, JSON, JSON lines, CSV and Parquet, row by row.

All but Parquet are UTF-8, with or without its mark, perhaps compressed. What is surely no UTF-8
text is refused, with the place of the first wrong byte: no encoding is guessed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

Row = tuple[str, dict[str, Any]]  # its place, for messages; its fields
CHUNK = 1 << 20  # bytes
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# of ISO-2022, which writes Japanese, Korean or Chinese in ASCII
ESCAPE = re.compile(rb"\x1b(\$[@AB]|\$[()][A-D]|\(J)")
TEXT_OR_END = re.compile(r'"(?:[^"\\]|\\.)*"|}')  # of an object in JSON
ENDINGS = {
    "ndjson": "jsonl", "jsonlines": "jsonl", "jsonl": "jsonl", "json": "json", "csv": "csv",
    "tsv": "tsv", "tab": "tsv", "parquet": "parquet", "pq": "parquet",
}  # fmt: skip


def format_of(file: Path) -> str:
    """Return the format that a file's ending names; text, if it is no known ending."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSED else file
    return ENDINGS.get(name.suffix.lower().removeprefix("."), "text")


def read_rows(
    file: Path, format: str, field: str, wanted: Sequence[str] | None, left_out: Counter[str]
) -> Iterator[Row]:
    """Read the rows of a file.

    Args:
        field: the name of the text in a row that is a text alone.
        wanted: the columns that are needed; None: all.
        left_out: counts what cannot be read and is not `wanted`.

    Raises:
        ValueError: something cannot be read; its place is named.
    """
    if format == "parquet":
        return _parquet(file, wanted, left_out)
    if format == "text":
        return _text(file, field)
    if format in ("csv", "tsv"):
        return _csv(file, "\t" if format == "tsv" else ",")
    return _json(file, field) if format == "json" else _jsonl(file, field)


def open_utf8(file: Path) -> IO[str]:
    """Open a file of UTF-8 text; newlines of all kinds become \\n, a mark at its begin is left out.

    Raises:
        ValueError: it is something else.
    """
    open_it: Callable[..., IO[Any]] = COMPRESSED.get(file.suffix.lower(), open)
    try:
        with open_it(file, "rb") as stream:
            if fault := _encoding_fault(stream):
                at, encoding = fault
                raise ValueError(
                    f"{file} is not UTF-8 text (byte {at}){encoding}: convert it, or choose "
                    f"other files"
                )
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # bz2 and gzip raise OSError for damage, without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file} is damaged, or is not what its ending says: {error}") from None
    return open_it(file, "rt", encoding="utf-8-sig")


def _encoding_fault(stream: IO[bytes]) -> tuple[int, str] | None:
    """Return the first byte that is no UTF-8 text, and its encoding in words, if it is certain."""
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
        if ascii_only and escape < 0 and (match := ESCAPE.search(last + chunk)):
            escape = at - len(last) + match.start()
        if not chunk:
            return (escape, ": it is ISO-2022") if ascii_only and escape >= 0 else None
        at, last = at + len(chunk), chunk[-3:]


def _text(file: Path, field: str) -> Iterator[Row]:
    with open_utf8(file) as stream:
        yield str(file), {field: stream.read()}


def _jsonl(file: Path, field: str) -> Iterator[Row]:
    with open_utf8(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _fields(parse_json(line, where), field, where)


def _json(file: Path, field: str) -> Iterator[Row]:
    """Read a list of rows, or one row; or JSON lines under another ending."""
    with open_utf8(file) as stream:
        before, first = next(((n, line) for n, line in enumerate(stream) if line.strip()), (0, ""))
        try:
            lines = isinstance(json.loads(first), dict | str | None)
        except (ValueError, RecursionError):
            lines = False
        if not lines:
            # with the blank lines, so that an error names the right line
            text = "\n" * before + first + stream.read()
            whole = parse_json(text, str(file)) if text.strip() else []
            for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
                yield f"{file}, row {number}", _fields(value, field, f"{file}, row {number}")
            return
    yield from _jsonl(file, field)


def parse_json(text: str, where: str) -> Any:
    """Return the value of a text of JSON.

    Args:
        where: the text's place; messages add the line in it, if it is not the first.

    Raises:
        ValueError: it is no JSON, or an object has a key twice.
    """
    objects = 0  # that have ended

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if len(fields := dict(pairs)) < len(pairs):
            raise _DuplicateKey(_repeated(key for key, _ in pairs)[0])
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except _DuplicateKey as duplicate:
        ends = (match for match in TEXT_OR_END.finditer(text) if match[0] == "}")
        before = text.count("\n", 0, next(islice(ends, objects - 1, None)).start())
        line = f", line {before + 1}" if before else ""
        key = str(duplicate)[:80]
        raise ValueError(
            f"{where}{line}: the key {key!r} stands twice in an object: name them apart"
        ) from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python takes
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None


class _DuplicateKey(Exception):
    """An object of JSON has this key more than once."""


def _repeated(names: Iterable[str]) -> list[str]:
    """Return the names that stand there more than once."""
    return [name for name, number in Counter(names).items() if number > 1]


def _fields(value: Any, field: str, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if value is None or isinstance(value, str):
        return {field: value}
    raise ValueError(
        f"{where} is {type(value).__name__}: a row is an object with fields, or a text"
    )


def _csv(file: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own is 128 kB
    with open_utf8(file) as stream:
        rows = csv.DictReader(stream, strict=True, delimiter=delimiter)
        try:
            names = list(rows.fieldnames or ())
            _check_columns(names, f"{file}, line 1")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, line {rows.line_num}: not {len(names)} columns as its head"
                    )
                yield f"{file}, line {rows.line_num}", dict(row)
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def _check_columns(names: list[str], where: str) -> None:
    if twice := _repeated(names):
        raise ValueError(
            f"{where}: {names.count(twice[0])} columns are named {twice[0]!r}: name them apart"
        )


def _parquet(file: Path, wanted: Sequence[str] | None, left_out: Counter[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("Parquet files need `pyarrow`: pip install 'dtrain[parquet]'") from None
    unread: set[str] = set()
    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
        _check_columns(names, str(file))
        if not names:  # the caller's error can then name the columns that there are
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
