"""Train in a process of its own, as a user does, and read what the run has written."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def train(*settings: str, folder: Path | None = None) -> tuple[dict[str, Any], list[dict]]:
    """Return a run's summary and the lines of its steps; without a folder it prints nothing."""
    with nullcontext(folder) if folder else TemporaryDirectory() as place:
        command = [sys.executable, "scripts/train.py", *settings, f"hydra.run.dir={place}"]
        subprocess.run(command, check=True, stdout=None if folder else subprocess.DEVNULL)
        return read(Path(place))


def read(folder: Path) -> tuple[dict[str, Any], list[dict]]:
    """Return an earlier run's summary and the lines of its steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), list(map(json.loads, lines))
