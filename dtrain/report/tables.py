"""A table of words, for a terminal and for a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dtrain.report.terminal import Terminal


@dataclass(frozen=True)
class Sheet:
    """A title, the names of the columns, and rows of as many words."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def show(self) -> None:
        """Print it.

        Where the terminal is narrow the words are folded, but for the first of a row.
        """
        made = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(self.columns):
            made.add_column(name, no_wrap=index == 0, overflow="fold")
        for row in self.rows:
            made.add_row(*row)
        Terminal().print(made)

    def markdown(self) -> str:
        """The same for a document."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        table = "\n".join(
            "| " + " | ".join(word.replace("|", r"\|") for word in line) + " |" for line in lines
        )
        return f"{self.title}:\n\n{table}\n"


def put_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put the text into a document, between two marks of it.

    Raises:
        ValueError: the document has no such marks.
    """
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{document} has no {begin.strip()} and {end.strip()} to write between")
    document.write_text(f"{before}{begin}{text}{end}{after}")
