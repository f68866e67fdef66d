"""Labelled rows that are parsed from Python's standard library, which every machine has."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.data.formats import Row
from dtrain.data.paths import file_stamps
from dtrain.data.sources import Source, is_test_or_table

PACKAGES = (
    "asyncio", "xml", "multiprocessing", "email", "importlib", "unittest", "logging", "urllib",
    "http",
)  # fmt: skip
WORD = re.compile(r"\w+|[^\w\s]")
Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST = 60  # words of a docstring that are labelled


class _Parsed(Source):
    """The modules of nine packages, parsed."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])

    def describe(self) -> dict[str, Any]:
        files = file_stamps(file for _, file in self._files())
        return {"kind": type(self).__name__, "files": files}

    def _functions(self) -> Iterator[tuple[str, str, str, Function]]:
        """Yield package, file, source and syntax of each function, methods and inner ones too."""
        for package, file, text, tree in self._modules():
            lines = text.splitlines()
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    yield package, file, "\n".join(lines[node.lineno - 1 : node.end_lineno]), node

    def _modules(self) -> Iterator[tuple[str, str, str, ast.Module]]:
        """Yield package, file, source and syntax of each module."""
        for package, file in self._files():
            text = file.read_text(encoding="utf-8")
            yield package, file.relative_to(self._root).as_posix(), text, ast.parse(text)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for package in PACKAGES:
            for file in sorted((self._root / package).rglob("*.py")):
                if not is_test_or_table(file.relative_to(self._root)):
                    yield package, file


class Functions(_Parsed):
    """Functions and the packages that they are from. Rows: text, label, file."""

    def rows(self) -> Iterator[Row]:
        for package, file, text, node in self._functions():
            yield f"{file}:{node.lineno}", {"text": text, "label": package, "file": file}


class Docstrings(_Parsed):
    """Names in docstrings. Rows: words, tags, file.

    A tag says what a word names in the module: class, function, parameter or other.
    """

    def rows(self) -> Iterator[Row]:
        for _, file, _, tree in self._modules():
            kinds = {n.name: "class" for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
            functions = [n for n in ast.walk(tree) if isinstance(n, Function)]
            kinds |= {n.name: "function" for n in functions}
            for node in functions:
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = kinds | {
                    a.arg: "parameter" for a in arguments if a.arg not in ("self", "cls")
                }
                words = WORD.findall(ast.get_docstring(node) or "")[:LONGEST]
                if words:
                    tags = [names.get(word, "other") for word in words]
                    yield f"{file}:{node.lineno}", {"words": words, "tags": tags, "file": file}


class Questions(_Parsed):
    """Questions what functions do. Rows: context, question, answer, start, file.

    The answer is the first line of the docstring.
    """

    def rows(self) -> Iterator[Row]:
        for _, file, text, node in self._functions():
            answer = (ast.get_docstring(node, clean=False) or "").strip().split("\n")[0]
            if answer and answer in text:
                row = {"context": text, "question": f"what does {node.name} do?", "answer": answer}
                yield f"{file}:{node.lineno}", row | {"start": text.index(answer), "file": file}
