"""The house's rules: dependencies run downwards only, files stay small, no word is said twice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dtrain"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room or file may import of ours, beyond its own room. What is not named here stands on top.
BELOW = {
    "layout": set(),
    "footprint": {"layout"},
    "cost": {"footprint"},
    "trace": {"batch", "constructor", "footprint", "initialize", "layout", "measure"},
    "batch": set(),
    "precision": set(),
    "measure": {"cost"},
    "data": {"constructor", "draw", "durable", "records"},
    "draw": set(),
    "model": {"layout"},
    "accelerator": {"accumulate", "batch", "layout", "optimizer", "presence"},
    "strategy": {"accelerator", "accumulate", "batch", "board", "compression", "cost", "engine", "exchange", "footprint", "initialize", "layout", "optimizer", "presence", "rehearsal",
                 "schedule", "split", "stages", "stepping", "units", "zero"},
    "engine": set(),
    "zero": {"cost", "footprint", "optimizer"},
    "schedule": {"footprint"},
    "exchange": set(),
    "split": {"footprint", "layout"},
    "stages": {"batch", "footprint", "layout", "measure", "schedule", "strategy.base"},
    "task": {"batch", "constructor", "data", "draw", "initialize", "layout", "measure", "pictures"},
    "pictures": set(),
    "durable": set(),
    "saved": {"durable", "records"},
    "initialize": {"adapt", "batch", "draw", "layout"},
    "adapt": {"layout"},
    "rehearsal": {"constructor", "layout"},
    "probe": {"batch", "constructor", "draw", "initialize", "layout", "rehearsal", "strategy.base", "trial", "unsaved"},
    "unsaved": {"besides", "draw", "layout", "trial"},
    "trial": {"batch", "draw", "layout"},
    "accumulate": {"batch", "footprint", "measure", "strategy.base"},
    "optimizer": set(),
    "presence": {"batch", "optimizer"},
    "stepping": {"besides", "constructor", "draw", "layout", "optimizer"},
    "besides": set(),
    "units": {"batch", "layout"},
    "checkpoint": {"durable", "launch", "optimizer", "saved"},
    "degrees": {"layout", "strategy.base"},
    "clip": {"plan", "strategy.base"},
    "plan": {"accumulate", "batch", "degrees", "draw", "fingerprint", "initialize", "layout", "precision", "stepping", "strategy.base"},
    "train": {"batch", "clip", "draw", "layout", "optimizer", "plan", "presence", "task.base"},
    "notes": set(),
    "hang": {"notes", "plan", "train"},
    "profile": {"cost", "launch", "measure", "plan", "schedule", "strategy", "train"},
    "info": {"batch", "constructor", "initialize", "layout", "measure", "precision"},
    "launch": {"measure"},
    "rendezvous": {"launch", "measure", "notes"},
    "fingerprint": {"launch", "records", "secret"},
    "preempt": {"launch", "notes"},
    "report": {"data.base", "footprint", "info", "measure", "records", "schedule", "streams", "train"},
    "board": set(),
    "compression": set(),
    "link": set(),
    "about": {"config"},
    "straggler": {"config"},
    "compare": {"about", "config", "constructor", "cost", "durable", "lock", "measure", "override", "profile", "records", "report", "secret", "streams"},
    "lock": {"records"},
    "records": set(),
    "quiet": set(),
    "secret": set(),
    "streams": set(),
    "claim": {"config", "durable", "launch", "lock", "saved"},
    "config": {"constructor", "data.tokenizer", "secret"},
    "constructor": {"secret"},
    "override": set(),
    "aliases": set(),
}  # fmt: skip
LARGEST_FILE, LARGEST_FUNCTION, PACKAGE_LINES = 400, 45, 21_600


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports to run; those for types alone do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dtrain":
            inner = node.module.removeprefix("dtrain").lstrip(".")
            found.update({inner} if inner else {alias.name for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_dependencies_run_downwards(file: Path) -> None:
    room = name_of(file).split(".")[0]
    for imported in imports(file) if room in BELOW else ():
        own = imported.split(".")[0] == room
        assert own or imported in BELOW[room] or imported.split(".")[0] in BELOW[room], f"{room} imports {imported}"


def test_models_import_torch_and_their_layout_alone() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {(name or "").split(".")[0] for name in names}
                theirs = {"transformers", "pathlib", "typing"} if file.stem == "hf" else set()
                assert roots <= {"torch", "math", "functools", "collections", "dtrain", "__future__"} | theirs
                assert all("distributed" not in (name or "") for name in names)


def test_the_loop_names_no_strategy_and_no_task() -> None:
    text = (PACKAGE / "train.py").read_text().replace("Tensor", "").replace("tensors", "").lower()  # torch's own
    strategies = {file.stem for file in (PACKAGE / "strategy").glob("*.py")} - {"__init__", "base"}
    tasks = {file.stem for file in (PACKAGE / "task").glob("*.py")} - {"__init__", "base"}
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert not [name for name in strategies | tasks if re.search(rf"\b{name}\b", code)]


def test_each_strategy_has_its_file_its_yaml_and_its_picture() -> None:
    yamls = {file.stem for file in (PACKAGE.parent / "configs" / "strategy").glob("*.yaml")}
    for file in (PACKAGE / "strategy").glob("*.py"):
        if file.stem in ("__init__", "base"):
            continue
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert any(name.startswith(file.stem) for name in yamls)
        assert "    " in docstring and "Cost" in docstring and "Source" in docstring, f"{file.name} lacks its story"


def test_what_is_shown_goes_through_one_door() -> None:
    """`streams.Terminal`, which takes no name for a sequence or for markup."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
                names = {alias.name for alias in node.names}
                assert name_of(file) == "streams" or not names & {"Console", "print"}, name_of(file)
                assert not (names & {"escape"} or node.module == "rich.markup"), name_of(file)


def test_files_and_functions_stay_small() -> None:
    total = 0
    for file in FILES:
        lines = file.read_text().count("\n")
        total += lines
        assert lines <= LARGEST_FILE, f"{name_of(file)} has {lines} lines"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= LARGEST_FUNCTION, f"{name_of(file)}.{node.name} has {length} lines"
    assert total <= PACKAGE_LINES
