"""Sources of documents, and of rows with several fields.

Every source describes its inputs before they are read, so that a cache knows if they changed.
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
from dtrain.data.formats import Row, format_of, open_utf8, parse_json, read_rows
from dtrain.data.paths import expand_path, file_stamps, find_files

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

    field: str = "text"  # the field of a row that is its document

    @cached_property
    def left_out(self) -> Counter[str]:
        """Number of things that are not read, by kind; counted while rows are read."""
        return Counter()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what decides the documents, cheaply: names, sizes, times.

        Raises:
            ValueError: there is nothing.
        """

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Read the name and the fields of each row, in a fixed order.

        Raises:
            ValueError: something cannot be read.
        """

    def rows_with(self, fields: Sequence[str]) -> Iterator[Row]:
        """Read the rows; no other fields than these are needed."""
        return self.rows()

    def documents(self) -> Iterator[tuple[str, str]]:
        """Read the name and the text of each row that has a text."""
        for where, row in self.rows_with([self.field]):
            if is_missing(row.get(self.field, "")):
                self.left_out["rows without a text (null)"] += 1
            else:
                yield where, text_of(row, self.field, where)


class StandardLibrary(Source):
    """The files of Python's own standard library: up to 10 MB of real text on every machine."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])

    def _files(self) -> list[Path]:
        top = self._root.glob("*.py")
        inside = (
            file for package in STANDARD_LIBRARY for file in (self._root / package).rglob("*.py")
        )
        files = [f for f in (*top, *inside) if not is_test_or_table(f.relative_to(self._root))]
        return sorted(files, key=lambda f: f.relative_to(self._root).as_posix())

    def describe(self) -> dict[str, Any]:
        return {"kind": "standard library", "files": file_stamps(self._files())}

    def rows(self) -> Iterator[Row]:
        for file in self._files():
            name = file.relative_to(self._root).as_posix()
            yield name, {"text": file.read_text(encoding="utf-8")}


class Files(Source):
    """UTF-8 text, JSON, JSON lines, CSV or Parquet by a path, a folder or a glob.

    Args:
        path: a file, a folder (everything in it), a pattern such as `docs/**/*.md`, or a list of
            these.
        format: text (a file is a document), json, jsonl, csv, tsv or parquet (a row is a document);
            None: by the file's ending.
        field: the column or key of the text, where a file has rows.
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
        files = find_files(self.path, "data.source.path")
        return {
            "kind": "files",
            "format": self.format,
            "field": self.field,
            "files": file_stamps(files),
        }

    def rows(self) -> Iterator[Row]:
        return self._read(None)

    def rows_with(self, fields: Sequence[str]) -> Iterator[Row]:
        return self._read(fields)

    def _read(self, wanted: Sequence[str] | None) -> Iterator[Row]:
        self.left_out.clear()
        files = find_files(self.path, "data.source.path", self.left_out)
        nonempty = [file for file in files if file.stat().st_size]
        if not nonempty:
            raise ValueError(
                f"{files[0]} is empty" + (", and so are all the others" if len(files) > 1 else "")
            )
        self.left_out["empty files"] += len(files) - len(nonempty)
        for file in nonempty:
            format = self.format or format_of(file)
            yield from read_rows(file, format, self.field, wanted, self.left_out)


class HuggingFace(Source):
    """A data set of the `datasets` library: from the hub, or a folder or script it can load.

    Args:
        name: of the data set, or a folder of `save_to_disk`.
        subset: as in `datasets.load_dataset(name, subset, split=split, revision=revision)`.
        split: as in `load_dataset`.
        revision: as in `load_dataset`.
        field: the column of the text.
    """

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        field: str = "text",
    ) -> None:
        if not name.strip():
            raise ValueError(
                "data.source.name is empty (is a variable not set?): give a data set's name or "
                "its folder"
            )
        self.name, self.subset, self.split, self.revision = name, subset, split, revision
        self.field = field
        self._dataset: Any = None

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError("data=hub needs `datasets`: pip install 'dtrain[hub]'") from None
        if self._dataset is None:
            folder = expand_path(self.name, "data.source.name")
            saved = ("dataset_info.json", "state.json", "dataset_dict.json")
            with self._errors_in_one_line("loaded"):
                if any((folder / file).exists() for file in saved):
                    dataset = datasets.load_from_disk(str(folder))
                else:
                    dataset = datasets.load_dataset(
                        self.name, self.subset, split=self.split, revision=self.revision
                    )
            if isinstance(dataset, dict):  # saved with all its splits
                if self.split not in dataset:
                    raise ValueError(
                        f"data.source.split={self.split}: {self.name} has {', '.join(dataset)}"
                    )
                dataset = dataset[self.split]
            self._dataset = dataset
        return self._dataset

    def describe(self) -> dict[str, Any]:
        fingerprint = self._load()._fingerprint
        return {"kind": "hub", "name": self.name, "field": self.field, "rows": fingerprint}

    def rows(self, *, undecoded: str | None = None) -> Iterator[Row]:
        """Read the rows; `undecoded` is a column of images, read as their files' bytes or paths."""
        dataset = self._load()
        import datasets

        if undecoded and isinstance(dataset.features.get(undecoded), datasets.Image):
            dataset = dataset.cast_column(undecoded, datasets.Image(decode=False))
        yield from self._rows_of(dataset)

    def rows_with(self, fields: Sequence[str]) -> Iterator[Row]:
        self.left_out.clear()
        dataset = self._load()
        columns = [name for name in fields if name in dataset.column_names]
        yield from self._rows_of(dataset.select_columns(columns) if columns else dataset)

    def _rows_of(self, dataset: Any) -> Iterator[Row]:
        with self._errors_in_one_line("read"):
            for number, row in enumerate(dataset):
                yield f"{self.name}, row {number}", row

    @contextmanager
    def _errors_in_one_line(self, done: str) -> Iterator[None]:
        """Raise ValueError, in one line, for whatever the library makes of a damaged file."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"data.source.name={self.name} cannot be {done}: {error_in_words(error)}"
            ) from error


class Squad(Source):
    """Questions on paragraphs, in SQuAD's JSON: 1.1, or 2.0 without unanswerable questions.

    Rows: context, question, answer, start (a character of the context), file (the article's title).
    Source: Rajpurkar et al. 2016 (1606.05250).
    """

    def __init__(self, path: str | list[str]) -> None:
        self.path = path

    def describe(self) -> dict[str, Any]:
        return {"kind": "squad", "files": file_stamps(find_files(self.path, "data.source.path"))}

    def rows(self) -> Iterator[Row]:
        self.left_out.clear()
        for file in find_files(self.path, "data.source.path", self.left_out):
            try:
                with open_utf8(file) as stream:
                    articles = parse_json(stream.read(), str(file))["data"]
                for article in articles:
                    for paragraph in article["paragraphs"]:
                        yield from self._questions(file, article.get("title", ""), paragraph)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file} is not in SQuAD's form: {error} is missing or of another kind"
                ) from None

    def _questions(self, file: Path, title: str, paragraph: dict[str, Any]) -> Iterator[Row]:
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
                answered = {"question": question["question"], "answer": text, "start": start}
                yield where, {"context": context, **answered, "file": title}


def is_test_or_table(path: Path) -> bool:
    """Return whether a file of the standard library is a test or a table."""
    return any(part.startswith(LEFT_OUT) for part in path.parts)


def check_source(source: object) -> None:
    """Raise ValueError for a text where a source belongs."""
    if isinstance(source, str):
        raise ValueError(
            f"data.source={source}: set data.source.path for files, or data.source.name for a "
            f"data set of the hub"
        )


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN, which pandas writes instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: dict[str, Any], field: str, where: str, key: str = "data.source.field") -> str:
    """Return the text in a row's field.

    Args:
        key: the setting that chooses the field, for messages.

    Raises:
        ValueError: there is no such field, or no text in it.
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
