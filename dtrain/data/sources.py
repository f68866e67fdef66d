"""Where documents come from. Every source names its inputs first, so that a cache can tell if they changed."""

from __future__ import annotations

import glob
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
    """A collection of documents."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the documents, cheaply: names, sizes, times. ValueError if there is nothing."""

    @abstractmethod
    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each document, in a fixed order. ValueError for what cannot be read."""


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

    def documents(self) -> Iterator[tuple[str, str]]:
        for file in self._files():
            yield file.relative_to(self._root).as_posix(), file.read_text(encoding="utf-8")


class Files(Source):
    """UTF-8 text, JSON lines or Parquet by a path, a folder or a glob.

    Args:
        path: a file, a folder (everything in it), or a pattern such as `docs/**/*.md`.
        format: text (a file is a document), jsonl or parquet (a row is one); None: by the file's ending.
        field: the column or key that holds the text, for jsonl and parquet.
    """

    FORMATS = ("text", "jsonl", "parquet")

    def __init__(self, path: str, format: str | None = None, field: str = "text") -> None:
        if format not in (None, *self.FORMATS):
            raise ValueError(f"data.source.format={format} is unknown: use {', '.join(self.FORMATS)}")
        self.path, self.format, self.field = path, format, field

    def _files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        found = path.rglob("*") if path.is_dir() else (Path(p) for p in glob.glob(str(path), recursive=True))
        files = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
        if not files:
            raise ValueError(f"data.source.path={self.path}: no such file, and no file in it or matching it")
        return files

    def _format(self, file: Path) -> str:
        return self.format or {".jsonl": "jsonl", ".parquet": "parquet"}.get(file.suffix.lower(), "text")

    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "format": self.format, "field": self.field, "files": _stamp(self._files())}

    def documents(self) -> Iterator[tuple[str, str]]:
        for file in self._files():
            read = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[self._format(file)]
            yield from read(file)

    def _text(self, file: Path) -> Iterator[tuple[str, str]]:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, or choose other files"
            ) from None
        if not text.strip():
            raise ValueError(f"{file} is empty")
        yield str(file), text

    def _jsonl(self, file: Path) -> Iterator[tuple[str, str]]:
        with file.open(encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{file}:{number}", self._field(json.loads(line), f"{file}, line {number}")
            except UnicodeDecodeError:
                raise ValueError(f"{file} is not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error.msg})") from None

    def _parquet(self, file: Path) -> Iterator[tuple[str, str]]:
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError:
            raise ValueError("Parquet files need `pyarrow`: pip install 'dtrain[parquet]'") from None
        try:
            table = parquet.ParquetFile(file)
        except ArrowInvalid as error:
            raise ValueError(f"{file} is not a Parquet file ({error})") from None
        if self.field not in table.schema_arrow.names:
            raise ValueError(_missing(str(file), self.field, table.schema_arrow.names))
        rows = (row for batch in table.iter_batches(columns=[self.field]) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{file}:{number}", self._field(row, f"{file}, row {number}")

    def _field(self, row: Any, where: str) -> str:
        if not isinstance(row, dict) or self.field not in row:
            raise ValueError(_missing(where, self.field, row if isinstance(row, dict) else ()))
        return _text(row[self.field], self.field, where)


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
        if self.field not in self._rows.column_names:
            raise ValueError(_missing(self.name, self.field, self._rows.column_names))
        return self._rows

    def describe(self) -> dict[str, Any]:
        return {"kind": "hub", "name": self.name, "field": self.field, "rows": self._load()._fingerprint}

    def documents(self) -> Iterator[tuple[str, str]]:
        for number, text in enumerate(self._load()[self.field]):
            yield f"{self.name}:{number}", _text(text, self.field, f"{self.name}, row {number}")


def _skipped(path: Path) -> bool:
    return any(part.startswith(LEFT_OUT) for part in path.parts)


def _stamp(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    return value


def _missing(where: str, field: str, present: Any) -> str:
    return f"{where} has no field {field!r}, only {', '.join(map(str, present)) or 'none'}: set data.source.field"
