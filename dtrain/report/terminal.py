"""What a process prints: where nobody reads it any more, the training goes on."""

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
from rich.text import Text

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # kinds of characters, as Unicode has them
# a pipe (`| head`), a terminal, a file that its reader has closed
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def without_control_characters(text: str) -> str:
    """A text for a terminal or a page: what would steer them (escape sequences, bells, other
    directions) is written out. It may be the name of somebody's file or column.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text
    )


def on_one_line(text: str) -> str:
    """The same in one line, which a name with line ends would end: these are written out too."""
    return without_control_characters(text).replace("\n", r"\n")


class Terminal(Console):
    """rich's console; a text, a cell or a title is one line of text as it stands, and never
    markup.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(on_one_line(text), **options)


def for_html(text: str) -> str:
    """The same for HTML, or for what Plotly takes for some: `<` begins nothing."""
    return html.escape(without_control_characters(text), quote=False)


def for_markdown(text: str) -> str:
    """The same for a line of Markdown."""
    return re.sub(r"([\\`\[])", r"\\\1", " ".join(for_html(text).split()))


def keep_open() -> None:
    """Let this process's standard streams take whatever is written, also if they are closed, or
    will be.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed before the start: the next file to be opened would take its place
            os.dup2(nothing := os.open(os.devnull, flags), number)
            if nothing != number:
                os.close(nothing)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        kept = getattr(getattr(stream, "buffer", None), "raw", None)
        if stream is getattr(sys, f"__{name}__") and not isinstance(kept, _Lasting):
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
