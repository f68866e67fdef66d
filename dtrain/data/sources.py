"""Where documents come from. Every source names its inputs first, so that a cache can tell if they changed."""

from __future__ import annotations

import csv
import glob
import io
import json
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Packages of the standard library, without tests and tables (encodings). Where a Python lacks one (Debian's
# has no idlelib, 3.13 no lib2to3) the corpus is smaller: its digest stands in the log.
STANDARD_LIBRARY = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "distutils", "email", "ensurepip", "html",
    "http", "idlelib", "importlib", "json", "lib2to3", "logging", "multiprocessing", "pydoc_data", "re", "sqlite3",
    "tkinter", "tomllib", "turtledemo", "unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
LEFT_OUT = ("test", "__pycache__", "_sysconfigdata")


class Source(ABC):
    """A collection of documents, or of rows with several fields."""

    field: str = "text"  # of a row: what its document is

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the documents, cheaply: names, sizes, times. ValueError if there is nothing."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, fields) of each row, in a fixed order. ValueError for what cannot be read."""

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each row."""
        for where, row in self.rows():
            yield where, text_of(row, self.field, where)


class StandardLibrary(Source):
    """The sources of Python's own standard library: up to ten megabytes of real text on every machine."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])

    def _files(self) -> list[Path]:
        top = self._root.glob("*.py")
        inside = (file for package in STANDARD_LIBRARY for file in (self._root / package).rglob("*.py"))
        kept = [f for f in (*top, *inside) if not _skipped(f.relative_to(self._root))]
        return sorted(kept, key=lambda f: f.relative_to(self._root).as_posix())

    def describe(self) -> dict[str, Any]:
        return {"kind": "standard library", "files": _stamp(self._files())}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files():
            yield file.relative_to(self._root).as_posix(), {"text": file.read_text(encoding="utf-8")}


class Files(Source):
    """UTF-8 text, JSON lines, CSV or Parquet by a path, a folder or a glob.

    Args:
        path: a file, a folder (everything in it), or a pattern such as `docs/**/*.md`.
        format: text (a file is a document), jsonl, csv or parquet (a row is one); None: by the file's ending.
        field: the column or key that holds the text, but for text.
    """

    FORMATS = ("text", "jsonl", "csv", "parquet")

    def __init__(self, path: str, format: str | None = None, field: str = "text") -> None:
        if format not in (None, *self.FORMATS):
            raise ValueError(f"data.source.format={format} is unknown: use {', '.join(self.FORMATS)}")
        self.path, self.format, self.field = path, format, field

    def _format(self, file: Path) -> str:
        kind = file.suffix.lower().removeprefix(".")
        return self.format or (kind if kind in self.FORMATS else "text")

    def describe(self) -> dict[str, Any]:
        files = files_at(self.path, "data.source.path")
        return {"kind": "files", "format": self.format, "field": self.field, "files": _stamp(files)}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        read = {"text": self._text, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
        for file in files_at(self.path, "data.source.path"):
            yield from read[self._format(file)](file)

    def _text(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        text = _utf8(file)
        if not text.strip():
            raise ValueError(f"{file} is empty")
        yield str(file), {self.field: text}


class HuggingFace(Source):
    """A data set of the `datasets` library: from the hub, or a folder or script it can load.

    Args:
        name: as in `datasets.load_dataset(name, subset, split=split)`, or a folder of `save_to_disk`.
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
        self.name, self.subset, self.split, self.revision, self.field = name, subset, split, revision, field
        self._rows: Any = None

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError("data=hub needs `datasets`: pip install 'dtrain[hub]'") from None
        if self._rows is None:
            try:
                if (Path(self.name) / "dataset_info.json").exists() or (Path(self.name) / "state.json").exists():
                    self._rows = datasets.load_from_disk(self.name)
                else:
                    self._rows = datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
            except (OSError, datasets.exceptions.DatasetsError) as error:
                raise ValueError(
                    f"data.source.name={self.name} cannot be loaded: {str(error).splitlines()[0]}"
                ) from error
        return self._rows

    def describe(self) -> dict[str, Any]:
        return {"kind": "hub", "name": self.name, "field": self.field, "rows": self._load()._fingerprint}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(self._load()):
            yield f"{self.name}, row {number}", row


class Squad(Source):
    """Questions on paragraphs, in SQuAD's JSON (1.1, or 2.0 without what cannot be answered).

    Rows: context, question, answer, start (a character of the context), file (the article's title).
    Source: Rajpurkar et al. 2016 (1606.05250).
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> dict[str, Any]:
        return {"kind": "squad", "files": _stamp(files_at(self.path, "data.source.path"))}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in files_at(self.path, "data.source.path"):
            try:
                for article in json.loads(_utf8(file))["data"]:
                    for paragraph in article["paragraphs"]:
                        yield from self._questions(file, article.get("title", ""), paragraph)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
            except (KeyError, TypeError) as error:
                raise ValueError(f"{file} is not in SQuAD's form: {error} is missing or of another kind") from None

    def _questions(self, file: Path, title: str, paragraph: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        context = paragraph["context"]
        for question in paragraph["qas"]:
            where = f"{file}, question {question.get('id', question['question'])}"
            for answer in question["answers"][:1]:
                start, text = answer["answer_start"], answer["text"]
                if context[start : start + len(text)] != text or not text:
                    raise ValueError(f"{where}: the answer {text!r} does not stand at character {start}")
                yield where, {"context": context, "question": question["question"], "answer": text, "start": start,
                              "file": title}  # fmt: skip


def _skipped(path: Path) -> bool:
    return any(part.startswith(LEFT_OUT) for part in path.parts)


def _stamp(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def text_of(row: dict[str, Any], field: str, where: str, key: str = "data.source.field") -> str:
    """The text in a row's field.

    Raises:
        ValueError: no such field, naming those there are and the `key` that chooses it; or no text in it.
    """
    if field not in row:
        raise ValueError(f"{where} has no field {field!r}, only {', '.join(map(str, row)) or 'none'}: set {key}")
    if not isinstance(text := row[field], str):
        raise ValueError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{where}: field {field!r} holds half a surrogate pair, which is no UTF-8 text")
    return text


def files_at(path: str, key: str) -> list[Path]:
    """The files of a path, a folder or a pattern, in order.

    Raises:
        ValueError: there are none.
    """
    place = Path(path).expanduser()
    found = place.rglob("*") if place.is_dir() else (Path(p) for p in glob.glob(str(place), recursive=True))
    if files := sorted(p for p in found if p.is_file() and not p.name.startswith(".")):
        return files
    raise ValueError(f"{key}={path}: no such file, and no file in it or matching it")


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it, or choose other files") from None


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(_utf8(file)), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error.msg})") from None
            yield f"{file}, line {number}", row if isinstance(row, dict) else {}


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(_utf8(file).removeprefix("\ufeff")), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"{file}, line {rows.line_num}: not {len(rows.fieldnames or ())} columns as its head")
            yield f"{file}, line {rows.line_num}", dict(row)
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError("Parquet files need `pyarrow`: pip install 'dtrain[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file ({error})") from None
    for number, row in enumerate(row for batch in table.iter_batches() for row in batch.to_pylist()):
        yield f"{file}, row {number}", row
