"""The command `dtrain`, also `python -m dtrain`: a sub-command, then Hydra's words.

    dtrain train launch.nproc=2 strategy=fsdp
    torchrun --nproc-per-node 2 -m dtrain train strategy=fsdp

What needs no torch is answered before it is imported, which takes seconds.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import NoReturn

import dtrain.launch.interrupts  # noqa: F401  before what takes long
from dtrain import __version__

COMMANDS = {
    "train": "train one model on one or many processes",
    "compare": "train it under several strategies, and show them side by side",
    "info": "tell what a model and a plan will cost; what goes together",
}
LISTING = "\n".join(f"  dtrain {name:9} {does}" for name, does in COMMANDS.items())
HELP = f"""dtrain {__version__}: see, prove and choose how to train one model on many processes

{LISTING}

Settings follow as key=value:

  dtrain train launch.nproc=2 strategy=fsdp
  dtrain compare strategies=[single,ddp,fsdp]
  dtrain info model=llama_70b

`dtrain COMMAND --help` tells what a command prints, and all its settings.
`eval "$(dtrain -sc install=bash)"` lets this shell complete them (zsh, fish: likewise).
"""
HELP_WORDS, COMPLETION_WORDS = ("-h", "--help"), ("-sc", "--shell-completion")
USAGE = 2  # exit status for a mistake of the user's


def main() -> None:
    """Run the sub-command that the command line names."""
    words = sys.argv[1:]
    launchers = [word for word in words[:1] if re.match("--local[-_]rank=", word)]  # of its own
    name, *rest = words[len(launchers) :] or ["--help"]
    if name in COMPLETION_WORDS:
        name, rest, sys.argv[0] = _completed_command(), words, "dtrain"
    if name in COMMANDS:
        sys.argv[1:] = [*launchers, *rest]
        _run(name)
    elif name in HELP_WORDS:
        print(HELP, end="")
    elif name == "--version":
        print(f"dtrain {__version__}")
    elif name:
        _refuse(name)


def _run(name: str) -> None:
    from dtrain import cli

    cli.main(name, getattr(cli, name))


def _completed_command() -> str:
    """Return the sub-command of the line that a shell wants completed.

    Hydra's completion knows none: it is taken out of the line. Where the line has none yet, print
    those that there are, and return nothing.
    """
    line = os.environ.get("COMP_LINE", "dtrain train ")
    match = re.match(r"\s*\S+\s+(\S+)(\s.*)", line)
    if not match or match[1] not in COMMANDS:
        print(" ".join(COMMANDS))
        return ""
    os.environ["COMP_LINE"] = f"dtrain{match[2]}"
    return match[1]


def _refuse(word: str) -> NoReturn:
    key, equals, _ = word.partition("=")
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    elif equals:  # its value may be a secret
        hint = f"a setting follows a command: dtrain train {key}=…"
    else:
        hint = f"use {', '.join(COMMANDS)}"
    print(f"dtrain: {key!r} is no command: {hint}", file=sys.stderr)
    sys.exit(USAGE)


if __name__ == "__main__":
    main()
