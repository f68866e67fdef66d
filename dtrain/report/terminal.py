"""Print to a terminal that may close at any time, and print texts that may be anybody's."""

from __future__ import annotations

import errno
import html
import io
import os
import re
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories of characters
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a closed pipe (`| head`), terminal or file


def without_control_characters(text: str) -> str:
    """Write out what would steer a terminal or a page: escape sequences, bells, directions.

    A text may be the name of anybody's file or column.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text
    )


def on_one_line(text: str) -> str:
    """Write out line ends too: a name may have some."""
    return without_control_characters(text).replace("\n", r"\n")


class Terminal(Console):
    """rich's console, which takes each text, cell and title as one line, and never as markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def say(self, text: str | Text) -> None:
        """Print a line; a terminal that is too narrow for it breaks it between words."""
        if not self.is_terminal:
            self.print(text, soft_wrap=True)
            return
        text = self.render_str(text) if isinstance(text, str) else text
        indent = len(text.plain) - len(text.plain.lstrip())
        text.plain = text.plain.lstrip() if indent else text.plain
        self.print(Padding(text, (0, 0, 0, indent)) if indent else text)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(on_one_line(text), **options)


def for_html(text: str) -> str:
    """Return the text for HTML, or for what Plotly takes for HTML: `<` begins no tag."""
    return html.escape(without_control_characters(text), quote=False)


def for_markdown(text: str) -> str:
    """Return the text for a line of Markdown."""
    return re.sub(r"([\\`\[])", r"\\\1", " ".join(for_html(text).split()))


def keep_open() -> None:
    """Let writing to this process's standard streams succeed, also once they are closed."""
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed before the start: the next file to be opened would take its place
            os.dup2(nothing := os.open(os.devnull, flags), number)
            if nothing != number:
                os.close(nothing)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if stream is getattr(sys, f"__{name}__") and not isinstance(raw, _Lasting):
            setattr(sys, name, _lasting(stream, number))
            setattr(sys, f"__{name}__", getattr(sys, name))


def _lasting(stream: Any, number: int) -> io.TextIOWrapper:
    if stream is None:
        return io.TextIOWrapper(
            io.BufferedWriter(_Lasting(number, "w", closefd=False)), "utf-8", "backslashreplace"
        )
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, "w", closefd=False)),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Lasting(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in GONE:  # for good, also for libraries, which write to the descriptor
                os.dup2(nothing := os.open(os.devnull, os.O_WRONLY), self.fileno())
                os.close(nothing)
            return len(data)
