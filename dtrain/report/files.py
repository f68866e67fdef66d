"""The run's folder: `metrics.jsonl`, an object a step, and `summary.json`, written at the end."""

from __future__ import annotations

import json
from typing import Any, TextIO

from dtrain.report.base import Logger, Run


class Files(Logger):
    """Machine-readable figures. A resumed run in the same folder goes on after the steps it has taken up."""

    def __init__(self) -> None:
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
        self._metrics.write(json.dumps(figures) + "\n")
        self._metrics.flush()  # other programs follow the file

    def finish(self, summary: dict[str, Any]) -> None:
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
