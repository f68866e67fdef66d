"""Labelled rows from Python's own standard library, found by parsing it: every machine has them."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.data.paths import file_stamps
from dtrain.data.sources import LEFT_OUT, Source

PACKAGES = (
    "asyncio",
    "xml",
    "multiprocessing",
    "email",
    "importlib",
    "unittest",
    "logging",
    "urllib",
    "http",
)
WORD = re.compile(r"\w+|[^\w\s]")
Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST = 60  # words of a docstring that are labelled


class _Parsed(Source):
    """The modules of nine packages, parsed."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_paths()["stdlib"])

    def describe(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "files": file_stamps([file for _, file in self._files()]),
        }

    def _functions(self) -> Iterator[tuple[str, str, str, Function]]:
        """(package, file, source, the function's syntax), methods and inner functions too."""
        for package, file, text, tree in self._modules():
            lines = text.splitlines()
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    yield package, file, "\n".join(lines[node.lineno - 1 : node.end_lineno]), node

    def _modules(self) -> Iterator[tuple[str, str, str, ast.Module]]:
        """(package, file, source, tree)"""
        for package, file in self._files():
            text = file.read_text(encoding="utf-8")
            yield package, file.relative_to(self._root).as_posix(), text, ast.parse(text)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for package in PACKAGES:
            for file in sorted((self._root / package).rglob("*.py")):
                if not any(
                    part.startswith(LEFT_OUT) for part in file.relative_to(self._root).parts
                ):
                    yield package, file


class Functions(_Parsed):
    """Which package is this function from? Rows: text, label, file."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for package, file, text, node in self._functions():
            yield f"{file}:{node.lineno}", {"text": text, "label": package, "file": file}


class Docstrings(_Parsed):
    """Names in docstrings: rows of words, tags and file.

    A tag says what the module's syntax has of that name.
    """

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for _, file, _, tree in self._modules():
            known = {n.name: "class" for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
            functions = [n for n in ast.walk(tree) if isinstance(n, Function)]
            known |= {n.name: "function" for n in functions}
            for node in functions:
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = known | {
                    a.arg: "parameter" for a in arguments if a.arg not in ("self", "cls")
                }
                words = WORD.findall(ast.get_docstring(node) or "")[:LONGEST]
                if words:
                    tags = [names.get(word, "other") for word in words]
                    yield f"{file}:{node.lineno}", {"words": words, "tags": tags, "file": file}


class Questions(_Parsed):
    """What does a function do?

    Rows of context, question, answer, start and file: the answer begins its docstring.
    """

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for _, file, text, node in self._functions():
            answer = (ast.get_docstring(node, clean=False) or "").strip().split("\n")[0]
            if answer and answer in text:
                row = {"context": text, "question": f"what does {node.name} do?", "answer": answer}
                yield f"{file}:{node.lineno}", row | {"start": text.index(answer), "file": file}
