"""The commands that pages show with their output: `make article` runs them and writes the output.

A block of ```console holds commands, after `$ `, and below each what it printed. A comment above a
block may say which lines are kept (`…` at the end stands for the others), and that its figures are
measured, so that another run has other ones:

    <!-- keep: validation loss|^weights -->
    <!-- varies -->
    <!-- varies, keep: validation loss -->

The commands of a section (`## …`) run in their order in one new folder that has links to the
files of the project. `article.zh.md`, beside `article.md`, has the same blocks.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?:<!-- (?P<varies>varies)?(?:, )?(?:keep: (?P<keep>.+?))? -->\n)?"
    r"```console\n(?P<inside>(?:.*\n)*?)```\n"
)
WRITTEN = ("outputs", "multirun")  # what runs leave: a section has its own
LEFT_OUT = "…"


@dataclass(frozen=True)
class Shown:
    """A command of a page, and the output that stands below it."""

    command: str
    output: str
    keep: str | None = None
    varies: bool = False


def commands(text: str) -> list[Shown]:
    """Return the commands of a page or a section."""
    return [
        Shown(*each.split("\n", 1), found["keep"], bool(found["varies"]))
        for found in BLOCK.finditer(text)
        for each in _parts(found["inside"])
    ]


def sections(text: str) -> list[str]:
    """Cut a page before each `## `; joined they are the page."""
    return re.split(r"^(?=## )", text, flags=re.M)


def translations(page: Path) -> list[Path]:
    """Return the same page in other languages."""
    return [file for file in [page.with_suffix(".zh.md")] if file.exists()]


def arguments(command: str) -> list[str]:
    """Return what is run for a command, by this interpreter."""
    first, *rest = shlex.split(command)
    if first == "dtrain":
        return [sys.executable, "-m", "dtrain", *rest]
    if first == "pytest":
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *rest]
    assert first == "python", f"{command}: a page's command begins with dtrain, pytest or python"
    return [sys.executable, *rest]


def outputs(section: str) -> Iterator[str]:
    """Run the commands of a section; yield what each has printed, as the page shows it."""
    with tempfile.TemporaryDirectory() as folder:
        for each in ROOT.iterdir():
            if each.name not in WRITTEN:
                Path(folder, each.name).symlink_to(each)
        for told in commands(section):
            yield shown(_printed(told.command, folder), folder, told.keep)


def rewritten(text: str, new: list[str]) -> str:
    """Return the text with new output below its commands."""
    left = iter(new)

    def with_output(found: re.Match[str]) -> str:
        typed = [each.split("\n", 1)[0] for each in _parts(found["inside"])]
        inside = "".join(f"$ {command}\n{next(left)}" for command in typed)
        return found[0].removesuffix(f"{found['inside']}```\n") + inside + "```\n"

    return BLOCK.sub(with_output, text)


def _parts(inside: str) -> list[str]:
    """Return a block's commands, each with the output below it."""
    nothing, *parts = re.split(r"^\$ ", inside, flags=re.M)
    assert not nothing, f"a block begins with a command: {nothing}"
    return parts


def _printed(command: str, folder: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        arguments(command), cwd=folder, env=environment, text=True, capture_output=True
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\nends with {done.returncode}:\n{printed}"
    return printed


def shown(printed: str, folder: str, keep: str | None) -> str:
    """Without the folder's own path, which has no meaning for a reader."""
    prefix = f"{folder}/"
    # a table's cell stays as wide as it is
    printed = re.sub(
        rf"{prefix}(\S+)(?= *│)", lambda found: found[1] + " " * len(prefix), printed
    ).replace(prefix, "")
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    kept = [line for line in lines if keep is None or re.search(keep, line)]
    return "".join(f"{line}\n" for line in kept + [LEFT_OUT] * (len(kept) < len(lines)))


def main(page: Path, *chosen: str) -> None:
    """Write the output of a page's commands into it, and into its translations.

    Args:
        page: in English.
        chosen: numbers of sections, as in `## 3. …`; none: all.
    """
    new = []
    for section in sections(page.read_text()):
        number = re.match(r"## (\d+)", section)
        if not chosen or (number and number[1] in chosen):
            new += [*outputs(section)]
        else:
            new += [told.output for told in commands(section)]
    for file in (page, *translations(page)):
        file.write_text(rewritten(file.read_text(), new))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
