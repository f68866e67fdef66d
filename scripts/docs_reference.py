"""Pages of the API reference, from the signatures and docstrings of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 88  # columns of a signature, as wide as a page shows
SECTIONS = {"Args", "Attributes", "Returns", "Raises", "Yields"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Subject(NamedTuple):
    """A page: its title, and the public names that it shows by the file that defines them."""

    title: str
    names: dict[str, tuple[str, ...]]


SUBJECTS = {
    "strategy": Subject(
        "Strategies",
        {
            "dtrain/parallel/strategy.py": (
                "Strategy", "ParallelContext", "Executor", "local_part", "full_tensor",
                "gradients", "all_reduce_mean", "all_reduce_sum", "check_options",
            ),
            "dtrain/parallel/messages.py": ("Message", "message", "all_reduce_each"),
        },
    ),
    "task": Subject(
        "Tasks",
        {"dtrain/task/base.py": ("Task", "Update", "Supervised", "LossUpdate", "Sizes")},
    ),
    "data": Subject("Data", {"dtrain/data/base.py": ("Data",)}),
    "layout": Subject("Layouts of models", {"dtrain/model/layout.py": ("Layout", "StepAware")}),
    "logger": Subject("Loggers", {"dtrain/report/base.py": ("Logger", "Run")}),
    "trainer": Subject(
        "The trainer",
        {
            "dtrain/train.py": ("Trainer", "Settings", "Step", "NonFinite"),
            "dtrain/parallel/training_state.py": ("TrainingState",),
        },
    ),
    "checkpoints": Subject(
        "Checkpoints",
        {
            "dtrain/run/checkpoint.py": ("Checkpoints", "load", "load_weights", "verified"),
            "dtrain/run/checkpoint_files.py": ("verify", "published", "read_manifest"),
        },
    ),
}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the text of each page by its name, `index.md` first."""
    rows = [
        f"| [{subject.title}]({name}.md) | {', '.join(f'`{n}`' for n in _names(subject))} |"
        for name, subject in SUBJECTS.items()
    ]
    index = "\n".join(
        [
            "# API\n",
            "What you extend, or call from a program of your own. Each page is made of the "
            "signatures and docstrings of the sources.\n",
            "| page | names |",
            "|---|---|",
            *rows,
            "",
        ]
    )
    return {"index.md": index} | {
        f"{name}.md": "\n".join(_page(subject)) for name, subject in SUBJECTS.items()
    }


def _names(subject: Subject) -> list[str]:
    return [name for names in subject.names.values() for name in names]


def _page(subject: Subject) -> Iterator[str]:
    yield f"# {subject.title}\n"
    for path, names in subject.names.items():
        module = ast.parse((ROOT / path).read_text())
        yield f"From [{path}](../../{path}).\n"
        yield from _docstring(module)
        found = {n.name: n for n in module.body if isinstance(n, ast.ClassDef | Function)}
        for name in names:
            yield from _entry(found[name])


def _entry(node: ast.ClassDef | Function) -> Iterator[str]:
    yield f"## {node.name}\n"
    if isinstance(node, Function):
        yield from _function(node)
        return
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    methods = [n for n in node.body if isinstance(n, Function)]
    made = [_signature(each) for each in methods if each.name == "__init__"]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    yield "\n".join(["```python", head, *made, "```\n"])
    yield from _docstring(node)
    if fields := [n for n in node.body if isinstance(n, ast.AnnAssign) and _is_public(n.target)]:
        yield "```python\n" + "\n".join(ast.unparse(each) for each in fields) + "\n```\n"
    for method in filter(_is_public, methods):
        yield f"### {node.name}.{method.name}\n"
        yield from _function(method)


def _is_public(node: ast.expr | Function) -> bool:
    name = node.name if isinstance(node, Function) else ast.unparse(node)
    return not name.startswith("_")


def _function(node: Function) -> Iterator[str]:
    decorators = [f"@{ast.unparse(each)}" for each in node.decorator_list]
    yield "\n".join(["```python", *decorators, _signature(node), "```\n"])
    yield from _docstring(node)


def _signature(node: Function) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"def {node.name}({ast.unparse(node.args)}){returns}"
    if len(whole) <= WIDTH:
        return whole
    arguments = re.split(r", (?![^\[(]*[\])])", ast.unparse(node.args))
    return "\n".join([f"def {node.name}(", *(f"    {a}," for a in arguments), f"){returns}"])


def _docstring(node: ast.Module | ast.ClassDef | Function) -> Iterator[str]:
    """Yield a docstring as Markdown: its paragraphs, and its sections as lists."""
    lines = (ast.get_docstring(node) or "").splitlines()
    section, item = "", ""
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            yield from _item(item)
            section, item = line.rstrip(":"), ""
            yield f"\n**{section}**\n"
        elif not section:
            yield line if line.startswith("    ") else _escaped(line)
        elif re.match(r" {4}\S", line):
            yield from _item(item)
            item = line.strip()
        elif line.strip():
            item += f" {line.strip()}"
    yield from _item(item)
    yield ""


def _item(text: str) -> Iterator[str]:
    if text:
        name, colon, rest = text.partition(": ")
        named = colon and re.fullmatch(r"[\w, *]+", name)
        yield f"* `{name}`: {_escaped(rest)}" if named else f"* {_escaped(text)}"


def _escaped(text: str) -> str:
    """Return prose in which nothing outside backticks is Markdown or HTML by accident."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
