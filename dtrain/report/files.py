"""The run's folder: `metrics.jsonl`, an object a step; `summary.json`, written at the end; `profile/`, if asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from dtrain.measure.timeline import Span
from dtrain.report import gantt
from dtrain.report.base import Logger, Run


class Files(Logger):
    """Machine-readable figures. A resumed run in the same folder goes on after the steps it has taken up.

    Args:
        pictures: draw the profile, beside its trace?
    """

    def __init__(self, pictures: bool = True) -> None:
        self._pictures = pictures
        self._metrics: TextIO | None = None

    def start(self, run: Run) -> None:
        self._folder = run.folder
        file = run.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() and run.first_step else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.first_step]
        self._metrics = file.open("w")
        self._metrics.writelines(f"{line}\n" for line in kept)

    def step(self, figures: dict[str, Any]) -> None:
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(figures) + "\n")
            self._metrics.flush()  # other programs follow the file
        except OSError as error:
            raise OSError(f"{self._metrics.name} could not be written: {error.strerror}") from error

    def profile(self, found: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        gantt.write(self._folder / "profile", ranks, title, pictures=self._pictures)

    def finish(self, summary: dict[str, Any]) -> None:
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")

    def close(self) -> None:
        if self._metrics:
            with suppress(OSError):  # what could not be written has been said
                self._metrics.close()
