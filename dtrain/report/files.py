"""The run's folder: `metrics.jsonl`, an object a step, and `summary.json`, written at the end."""

from __future__ import annotations

import json
from typing import Any, TextIO

from dtrain.report.base import Logger, Run


class Files(Logger):
    """Machine-readable figures. A resumed run in the same folder appends."""

    def __init__(self) -> None:
        self._metrics: TextIO | None = None

    def start(self, run: Run) -> None:
        self._folder = run.folder
        self._metrics = (run.folder / "metrics.jsonl").open("a")

    def step(self, figures: dict[str, Any]) -> None:
        assert self._metrics is not None
        self._metrics.write(json.dumps(figures) + "\n")
        self._metrics.flush()  # other programs follow the file

    def finish(self, summary: dict[str, Any]) -> None:
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
