"""The house's rules: dependencies run downwards only, files stay small, no word is said twice."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dtrain"
FILES = sorted(PACKAGE.rglob("*.py"))
# The rooms, from the ground up: each imports of those before it, and of itself.
ROOMS = (
    "files",
    "config",
    "data",
    "model",
    "task",
    "launch",
    "parallel",
    "train",
    "strategy",
    "cost",
    "report",
    "run",
    "compare",
    "cli",
)
LARGEST_FUNCTION = 45
LINES = {
    "files": 300, "config": 1_600, "data": 2_600, "model": 1_600, "task": 1_500, "launch": 1_350, "parallel": 3_050, "train": 300,
    "strategy": 5_200, "cost": 1_350, "report": 900, "run": 1_300, "compare": 2_100, "cli": 420,
}  # fmt: skip


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, to run or for types."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dtrain":
            inner = node.module.removeprefix("dtrain").lstrip(".")
            names = {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name for name in names if name in MODULES} or {inner}
    return found


# Where strategies are, and what they are called.
STRATEGIES = {
    file: names
    for file in (PACKAGE / "strategy").rglob("*.py")
    if (names := re.findall(r'^    name = "(\w+)"', file.read_text(), re.M))
}
MODULES = {name_of(file) for file in FILES}


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in MODULES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_dependencies_run_downwards(file: Path) -> None:
    room = room_of(name_of(file))
    below = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
    assert {name for name in imports(file) if room_of(name) not in below} == set()


def test_models_import_torch_and_their_layout_alone() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        if file.stem in ("layout", "adapt", "own", "initialize"):  # what is done with models
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {(name or "").split(".")[0] for name in names}
                theirs = {"transformers", "pathlib", "typing"} if file.stem == "hf" else set()
                assert roots <= {"torch", "math", "functools", "collections", "dtrain", "__future__"} | theirs
                assert all("distributed" not in (name or "") for name in names)


def test_the_loop_names_no_strategy_and_no_task() -> None:
    text = (PACKAGE / "train.py").read_text().replace("Tensor", "").replace("tensors", "").lower()  # torch's own
    strategies = {name for names in STRATEGIES.values() for name in names}
    tasks = {file.stem for file in (PACKAGE / "task").glob("*.py")} - {"__init__", "base", "batch"}
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert not [name for name in strategies | tasks if re.search(rf"\b{name}\b", code)]


def test_each_strategy_has_its_yaml_and_its_picture() -> None:
    yamls = {file.stem for file in (PACKAGE.parent / "configs" / "strategy").glob("*.yaml")}
    for file, names in STRATEGIES.items():
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert all(any(yaml.startswith(name) for yaml in yamls) for name in names)
        assert "    " in docstring and "Cost" in docstring and "Source" in docstring, f"{file} lacks its story"


def test_what_is_shown_goes_through_one_door() -> None:
    """`report.terminal.Terminal`, which takes no name for a sequence or for markup."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
                names = {alias.name for alias in node.names}
                assert name_of(file) == "report.terminal" or not names & {"Console", "print"}, name_of(file)
                assert not (names & {"escape"} or node.module == "rich.markup"), name_of(file)


def test_rooms_and_functions_stay_small() -> None:
    total: Counter[str] = Counter()
    for file in FILES:
        total[room_of(name_of(file))] += file.read_text().count("\n")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= LARGEST_FUNCTION, f"{name_of(file)}.{node.name} has {length} lines"
    assert {room: lines for room, lines in total.items() if room in LINES and lines > LINES[room]} == {}
