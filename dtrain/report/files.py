"""Files in the run's folder: `metrics.jsonl`, a line a step; `summary.json`; `profile/`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dtrain.cost.timeline import Span
from dtrain.files import json_files
from dtrain.report import step_chart
from dtrain.report.base import Logger, Run

SUMMARY = "summary.json"


def summary_in(folder: Path) -> dict[str, Any]:
    """Return the summary of a run that has done all its steps.

    Raises:
        ValueError: a figure is no number, so no run has written the file.
        OSError: it is not there, or cannot be read.
    """
    summary = json_files.figures(file := folder / SUMMARY)
    for key in ("loss", "val_loss", "tokens_per_second"):
        value = summary.get(key)
        if not (isinstance(value, int | float) or (value is None and key != "loss")):
            raise ValueError(f"{file} has {key}={str(value)[:40]}: no run has left that")
    return summary


class Files(Logger):
    """Write figures for programs. A resumed run appends to the lines of the steps it goes on from.

    Args:
        pictures: whether to draw the profile, beside its trace.
    """

    def __init__(self, pictures: bool = True) -> None:
        self._pictures = pictures
        self._metrics: TextIO | None = None

    def start(self, run: Run) -> None:
        self._folder = run.folder
        file = run.folder / "metrics.jsonl"
        earlier = {}  # the last line of each step that was done
        for line in json_files.lines(file) if run.first_step else ():
            if type(step := line.get("step")) is int and 0 < step <= run.first_step:
                earlier[step] = line
        new = file.with_suffix(".new")  # a kill leaves the old lines or the new ones
        lines = [earlier[step] for step in sorted(earlier)]
        new.write_text("".join(f"{json_files.dumps(line)}\n" for line in lines))
        new.replace(file)
        self._metrics = file.open("a")

    def step(self, figures: dict[str, Any]) -> None:
        assert self._metrics is not None
        if not os.fstat(self._metrics.fileno()).st_nlink:
            raise OSError(
                f"{self._metrics.name} was removed while the run went on: what it would write is "
                f"lost"
            )
        try:
            self._metrics.write(json_files.dumps(figures) + "\n")
            self._metrics.flush()  # other programs follow the file
        except OSError as error:
            raise OSError(f"{self._metrics.name} could not be written: {error.strerror}") from error

    def profile(self, report: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        step_chart.write(self._folder / "profile", ranks, title, pictures=self._pictures)

    def finish(self, summary: dict[str, Any]) -> None:
        (self._folder / SUMMARY).write_text(json_files.dumps(summary, indent=2, default=str) + "\n")

    def close(self) -> None:
        if self._metrics:
            with suppress(OSError):  # a write that failed has raised before
                self._metrics.close()
