"""Where documents come from.

Every source names its inputs first, so that a cache can tell if they changed.
"""

from __future__ import annotations

import math
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dtrain.config.user_code import error_in_words
from dtrain.data.formats import format_of, parsed, rows_of, utf8
from dtrain.data.paths import expanded, file_stamps, files_at

# Packages of the standard library, without tests and tables (encodings). Where a Python lacks one
# (Debian's has no idlelib, 3.13 no lib2to3) the corpus is smaller: its digest stands in the log.
STANDARD_LIBRARY = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "distutils", "email",
    "ensurepip", "html", "http", "idlelib", "importlib", "json", "lib2to3", "logging",
    "multiprocessing", "pydoc_data", "re", "sqlite3", "tkinter", "tomllib", "turtledemo",
    "unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
LEFT_OUT = ("test", "__pycache__", "_sysconfigdata")


class Source(ABC):
    """A collection of documents, or of rows with several fields."""

    field: str = "text"  # of a row: what its document is

    @cached_property
    def left_out(self) -> Counter[str]:
        """What is not read of it, by kind, counted on the way."""
        return Counter()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the documents, cheaply: names, sizes, times.

        ValueError if there is nothing.
        """

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, fields) of each row, in a fixed order. ValueError for what cannot be read."""

    def rows_with(self, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, fields) of each row, of which no other fields are needed."""
        return self.rows()

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each row that has one."""
        for where, row in self.rows_with([self.field]):
            if is_missing(row.get(self.field, "")):
                self.left_out["rows without a text (null)"] += 1
            else:
                yield where, text_of(row, self.field, where)


class StandardLibrary(Source):
    """The sources of Python's own standard library: up to ten megabytes of real text on every
    machine.
    """

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])

    def _files(self) -> list[Path]:
        top = self._root.glob("*.py")
        inside = (
            file for package in STANDARD_LIBRARY for file in (self._root / package).rglob("*.py")
        )
        kept = [f for f in (*top, *inside) if not _skipped(f.relative_to(self._root))]
        return sorted(kept, key=lambda f: f.relative_to(self._root).as_posix())

    def describe(self) -> dict[str, Any]:
        return {"kind": "standard library", "files": file_stamps(self._files())}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files():
            yield (
                file.relative_to(self._root).as_posix(),
                {"text": file.read_text(encoding="utf-8")},
            )


class Files(Source):
    """UTF-8 text, JSON, JSON lines, CSV or Parquet by a path, a folder or a glob.

    Args:
        path: a file, a folder (everything in it), a pattern such as `docs/**/*.md`, or a list of
            these.
        format: text (a file is a document), json, jsonl, csv, tsv or parquet (a row is one); None:
            by the ending.
        field: the column or key that holds the text, but for text.
    """

    FORMATS = ("text", "json", "jsonl", "csv", "tsv", "parquet")

    def __init__(
        self, path: str | list[str], format: str | None = None, field: str = "text"
    ) -> None:
        if format not in (None, *self.FORMATS):
            raise ValueError(
                f"data.source.format={format} is unknown: use {', '.join(self.FORMATS)}"
            )
        self.path, self.format, self.field = path, format, field

    def describe(self) -> dict[str, Any]:
        files = files_at(self.path, "data.source.path")
        return {
            "kind": "files",
            "format": self.format,
            "field": self.field,
            "files": file_stamps(files),
        }

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return self._read(None)

    def rows_with(self, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        return self._read(fields)

    def _read(self, wanted: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        self.left_out.clear()
        files = files_at(self.path, "data.source.path", self.left_out)
        full = [file for file in files if file.stat().st_size]
        if not full:
            raise ValueError(
                f"{files[0]} is empty" + (", and so are all the others" if len(files) > 1 else "")
            )
        self.left_out["empty files"] += len(files) - len(full)
        for file in full:
            yield from rows_of(
                file, self.format or format_of(file), self.field, wanted, self.left_out
            )


class HuggingFace(Source):
    """A data set of the `datasets` library: from the hub, or a folder or script it can load.

    Args:
        name: as in `datasets.load_dataset(name, subset, split=split)`, or a folder of
            `save_to_disk`.
        subset, split, revision: likewise.
        field: the column that holds the text.
    """

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        field: str = "text",
    ) -> None:
        self.name = name
        self.subset = subset
        self.split = split
        self.revision = revision
        self.field = field
        if not name.strip():
            raise ValueError(
                "data.source.name is empty (is a variable not set?): give a data set's name or "
                "its folder"
            )
        self._rows: Any = None

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError("data=hub needs `datasets`: pip install 'dtrain[hub]'") from None
        if self._rows is None:
            folder = expanded(self.name, "data.source.name")
            with self._said("loaded"):
                if any(
                    (folder / f"{kind}.json").exists()
                    for kind in ("dataset_info", "state", "dataset_dict")
                ):
                    self._rows = datasets.load_from_disk(str(folder))
                else:
                    self._rows = datasets.load_dataset(
                        self.name, self.subset, split=self.split, revision=self.revision
                    )
            if isinstance(self._rows, dict):  # saved with all its splits
                if self.split not in self._rows:
                    raise ValueError(
                        f"data.source.split={self.split}: {self.name} has {', '.join(self._rows)}"
                    )
                self._rows = self._rows[self.split]
        return self._rows

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "name": self.name,
            "field": self.field,
            "rows": self._load()._fingerprint,
        }

    def rows(self, *, undecoded: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows. `undecoded`: a column of images that come as their files' bytes, or paths."""
        known = self._load()
        import datasets

        if undecoded and isinstance(known.features.get(undecoded), datasets.Image):
            known = known.cast_column(undecoded, datasets.Image(decode=False))
        yield from self._each(known)

    def rows_with(self, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        self.left_out.clear()
        known = self._load()
        columns = [name for name in fields if name in known.column_names]
        yield from self._each(known.select_columns(columns) if columns else known)

    def _each(self, known: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._said("read"):
            for number, row in enumerate(known):
                yield f"{self.name}, row {number}", row

    @contextmanager
    def _said(self, done: str) -> Iterator[None]:
        """In a line, whatever the library, or one that it uses, makes of a file."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"data.source.name={self.name} cannot be {done}: {error_in_words(error)}"
            ) from error


class Squad(Source):
    """Questions on paragraphs, in SQuAD's JSON (1.1, or 2.0 without what cannot be answered).

    Rows: context, question, answer, start (a character of the context), file (the article's title).
    Source: Rajpurkar et al. 2016 (1606.05250).
    """

    def __init__(self, path: str | list[str]) -> None:
        self.path = path

    def describe(self) -> dict[str, Any]:
        return {"kind": "squad", "files": file_stamps(files_at(self.path, "data.source.path"))}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.left_out.clear()
        for file in files_at(self.path, "data.source.path", self.left_out):
            try:
                with utf8(file) as stream:
                    articles = parsed(stream.read(), str(file))["data"]
                for article in articles:
                    for paragraph in article["paragraphs"]:
                        yield from self._questions(file, article.get("title", ""), paragraph)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file} is not in SQuAD's form: {error} is missing or of another kind"
                ) from None

    def _questions(
        self, file: Path, title: str, paragraph: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        context = paragraph["context"]
        for question in paragraph["qas"]:
            where = f"{file}, question {question.get('id', question['question'])}"
            if not question["answers"]:
                self.left_out["questions without an answer"] += 1
            for answer in question["answers"][:1]:
                start, text = answer["answer_start"], answer["text"]
                if context[start : start + len(text)] != text or not text:
                    raise ValueError(
                        f"{where}: the answer {text!r} does not stand at character {start}"
                    )
                yield (
                    where,
                    {
                        "context": context,
                        "question": question["question"],
                        "answer": text,
                        "start": start,
                        "file": title,
                    },
                )


def _skipped(path: Path) -> bool:
    return any(part.startswith(LEFT_OUT) for part in path.parts)


def is_missing(value: Any) -> bool:
    """Is it null, or NaN, which pandas has in its place?"""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: dict[str, Any], field: str, where: str, key: str = "data.source.field") -> str:
    """The text in a row's field.

    Raises:
        ValueError: no such field, naming those there are and the `key` that chooses it; or no text
            in it.
    """
    if field not in row:
        raise ValueError(
            f"{where} has no field {field!r}, only {', '.join(map(str, row)) or 'none'}: set {key}"
        )
    if is_missing(row[field]):
        raise ValueError(f"{where}: field {field!r} is null: leave such rows out, or set {key}")
    if not isinstance(text := row[field], str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: field {field!r} holds half a surrogate pair, which is no UTF-8 text"
        ) from None
    return text
