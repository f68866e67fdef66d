"""Draw the rooms of `dtrain/` and who imports whom, from the imports themselves, into
docs/rooms.svg: `make rooms`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PICTURE = ROOT / "dtrain", ROOT / "docs" / "rooms.svg"
# From the ground up: each room imports of those before it, and of itself.
# `tests/test_architecture.py` holds them to it.
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
    "__main__",
)
CELL, LEFT, TOP, TEXT = 26, 92, 78, 660  # pixels


def module_of(file: Path) -> str:
    """A file's dotted name below `dtrain`: `strategy.ddp`; a folder's own is
    `strategy.__init__`.
    """
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    """The room in which a module stands: `strategy` of `strategy.tensor.layers`."""
    return module.split(".")[0]


def imports_of(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, to run or for types."""
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "dtrain"
        ):
            inner = node.module.removeprefix("dtrain").lstrip(".")
            for alias in node.names:
                name = f"{inner}.{alias.name}".lstrip(".")
                if module := name if _is_module(name) else inner:  # not the package itself
                    yield module


def _is_module(name: str) -> bool:
    place = PACKAGE / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").exists()


def draw() -> str:
    """The picture: a row for each room, the highest first; a dot where it imports of the room
    above that column.
    """
    rooms = ROOMS[::-1]
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if room_of(module_of(file)) in ROOMS]
    arrows = {
        (room_of(module_of(file)), room_of(name)) for file in files for name in imports_of(file)
    }
    width, height = LEFT + CELL * len(rooms) + TEXT, TOP + CELL * len(rooms) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" '
        f'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for row, room in enumerate(rooms):
        y, x = TOP + CELL * row, LEFT + CELL * row
        lines += [
            (
                f'<rect x="{LEFT}" y="{y}" width="{CELL * len(rooms)}" height="{CELL}" '
                f'fill="{("#f4f6f8", "#fff")[row % 2]}"/>'
            ),
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#d5dbe1"/>',
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{room}</text>',
            (
                f'<text x="{x + 16}" y="{TOP - 6}" transform="rotate(-60 {x + 16} '
                f'{TOP - 6})">{room}</text>'
            ),
            (
                f'<text x="{LEFT + CELL * len(rooms) + 12}" y="{y + 17}" '
                f'fill="#555">{escape(_sentence(room))}</text>'
            ),
        ]
        for column, other in enumerate(rooms):
            if (room, other) in arrows and room != other:
                # red: upwards, which no test lets pass
                colour = "#2b6cb0" if column > row else "#c0392b"
                lines.append(
                    f'<circle cx="{LEFT + CELL * column + 13}" cy="{y + 13}" r="6" '
                    f'fill="{colour}"/>'
                )
    return "\n".join([*lines, "</svg>", ""])


def _sentence(room: str) -> str:
    """The first of what the room says of itself."""
    file = PACKAGE / room / "__init__.py"
    said = (
        ast.get_docstring(
            ast.parse((file if file.exists() else PACKAGE / f"{room}.py").read_text())
        )
        or ""
    )
    first = " ".join(said.split("\n\n")[0].split()).rstrip(".")
    return first if len(first) < 100 else first.split(". ")[0]


if __name__ == "__main__":
    PICTURE.write_text(draw())
