"""Say in one line what user's code has raised."""

from __future__ import annotations

import os
import sysconfig
import traceback

# Folders whose code is not the user's: dtrain's own, Python's and installed packages'.
NOT_USERS = (
    os.path.dirname(os.path.dirname(__file__)),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)
LONGEST = 200  # characters of an error's text


def error_in_words(error: Exception) -> str:
    """Return an error's class and first line, and the line of user's code that raised it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = traceback.extract_tb(error.__traceback__)
    of_user = [frame for frame in frames if not frame.filename.startswith(("<", *NOT_USERS))]
    place = ""
    if of_user:
        place = f" ({os.path.basename(of_user[-1].filename)}, line {of_user[-1].lineno})"
    return f"{type(error).__name__}: {text}"[:LONGEST].rstrip(": ") + place
