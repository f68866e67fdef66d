"""The house's rules: dependencies run downwards only, files stay small, no word is said twice."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from rooms import PACKAGE, PICTURE, ROOMS, draw, imports_of, module_of, room_of

FILES = sorted(PACKAGE.rglob("*.py"))
LARGEST_FUNCTION = 72  # without signature and docstring
LINES = {
    "files": 350, "config": 1_450, "data": 2_950, "model": 2_000, "task": 1_650, "launch": 1_500,
    "parallel": 3_450, "train": 340, "strategy": 6_480, "cost": 1_450, "report": 1_000,
    "run": 1_520, "compare": 2_450, "cli": 490,
}  # fmt: skip


# Where strategies are, and what they are called.
STRATEGIES = {
    file: names
    for file in (PACKAGE / "strategy").rglob("*.py")
    if (names := re.findall(r'^    name = "(\w+)"', file.read_text(), re.M))
}


def test_every_room_has_its_place() -> None:
    assert {room_of(module_of(file)) for file in FILES} - {"__init__"} == set(ROOMS) == set(LINES)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_dependencies_run_downwards(file: Path) -> None:
    """From room to room, types included."""
    room = room_of(module_of(file))
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    assert {name for name in imports_of(file) if room_of(name) not in below} == set()


def test_the_picture_of_the_rooms_is_as_they_are() -> None:
    """Otherwise: `make rooms`."""
    assert PICTURE.read_text() == draw()


def test_the_page_on_the_rooms_names_files_that_there_are() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for name in re.findall(r"(?<![\w./])((?:\w+/)*\w+\.(?:py|yaml|svg))\b", page):
        assert any(PACKAGE.rglob(name)) or any(
            (PACKAGE.parent / part / name).exists() for part in ("", "docs")
        ), name


def test_models_import_torch_and_their_layout_alone() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        if file.stem in ("layout", "adapt", "own", "initialize"):  # what is done with models
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                roots = {(name or "").split(".")[0] for name in names}
                theirs = {"transformers", "pathlib", "typing"} if file.stem == "hf" else set()
                assert (
                    roots
                    <= {"torch", "math", "functools", "collections", "dtrain", "__future__"}
                    | theirs
                )
                assert all("distributed" not in (name or "") for name in names)


def test_the_loop_names_no_strategy_and_no_task() -> None:
    # torch's own
    text = (PACKAGE / "train.py").read_text().replace("Tensor", "").replace("tensors", "").lower()
    strategies = {name for names in STRATEGIES.values() for name in names}
    tasks = {file.stem for file in (PACKAGE / "task").glob("*.py")} - {"__init__", "base", "batch"}
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert not [name for name in strategies | tasks if re.search(rf"\b{name}\b", code)]


def test_each_strategy_has_its_yaml_and_its_picture() -> None:
    yamls = {file.stem for file in (PACKAGE.parent / "configs" / "strategy").glob("*.yaml")}
    for file, names in STRATEGIES.items():
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert all(any(yaml.startswith(name) for yaml in yamls) for name in names)
        assert "    " in docstring and "Cost" in docstring and "Source" in docstring, (
            f"{file} lacks its story"
        )


def test_what_is_shown_goes_through_one_door() -> None:
    """`report.terminal.Terminal`, which takes no name for a sequence or for markup."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
                names = {alias.name for alias in node.names}
                assert module_of(file) == "report.terminal" or not names & {"Console", "print"}, (
                    module_of(file)
                )
                assert not (names & {"escape"} or node.module == "rich.markup"), module_of(file)


def test_rooms_and_functions_stay_small() -> None:
    total: Counter[str] = Counter()
    for file in FILES:
        total[room_of(module_of(file))] += file.read_text().count("\n")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[ast.get_docstring(node) is not None and len(node.body) > 1]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= LARGEST_FUNCTION, (
                    f"{module_of(file)}.{node.name} has {length} lines"
                )
    assert {
        room: lines for room, lines in total.items() if room in LINES and lines > LINES[room]
    } == {}
