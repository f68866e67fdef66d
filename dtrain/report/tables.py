"""Tables, for a terminal and for a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from dtrain.report.terminal import Terminal

# a plain table at the left edge, in rich's words
PLAIN: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}


def show_table(
    title: str | None,
    columns: Sequence[str | Column],
    rows: Iterable[Sequence[str]],
    *,
    terminal: Terminal | None = None,
    **style: Any,
) -> None:
    """Print a table. An empty row draws a line; `style` goes to rich's Table.

    Where the terminal is too narrow for its longest words it is printed as a list.
    """
    terminal, rows = terminal or Terminal(), list(rows)
    table = Table(*columns, title=title, **style)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    unbounded = terminal.options.update(max_width=1_000_000)
    if terminal.measure(table, options=unbounded).minimum <= terminal.width:
        terminal.print(table)
    else:
        _show_list(terminal, title, [str(c.header) for c in table.columns], filter(None, rows))


def _show_list(
    terminal: Terminal, title: str | None, names: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print each row as its first cell, and below it a line for each of the others."""
    if title:
        terminal.say(title)
    for first, *others in rows:
        terminal.say(f"  {first}")
        for name, cell in zip(names[1:], others, strict=False):
            terminal.say(f"    {name} {cell}".rstrip() if name else f"    {cell}")


def numbers(*names: str, no_wrap: bool = False) -> list[Column]:
    """Return columns of numbers, which stand to the right."""
    return [Column(name, justify="right", no_wrap=no_wrap) for name in names]


@dataclass(frozen=True)
class Sheet:
    """A table of words: a title, the names of the columns, and rows of as many words."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def show(self) -> None:
        """Print the table; a narrow terminal folds all words but the first of a row."""
        first, *others = self.columns
        columns = [Column(first, no_wrap=True, overflow="fold")]
        columns += [Column(name, overflow="fold") for name in others]
        show_table(self.title, columns, self.rows, **PLAIN)

    def markdown(self) -> str:
        """Return the table for a document."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        table = "\n".join(
            "| " + " | ".join(word.replace("|", r"\|") for word in line) + " |" for line in lines
        )
        return f"{self.title}:\n\n{table}\n"


def put_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put the text between two marks of a document.

    Raises:
        ValueError: the document has no such marks.
    """
    before, _, rest = document.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{document} has no {begin.strip()} and {end.strip()} to write between")
    document.write_text(f"{before}{begin}{text}{end}{after}")
