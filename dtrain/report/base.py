"""The interface of loggers: what a run reports to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cost.timeline import Span


@dataclass(frozen=True)
class Run:
    """What a run is, when training starts."""

    strategy: str  # as it was asked for
    mesh: dict[str, int]  # ranks along each axis
    world_size: int
    first_step: int  # steps that earlier attempts have done
    steps: int
    folder: Path
    facts: tuple[str, ...]  # lines for a person: model, data, precision, threads
    config: dict[str, Any]
    unit: str = "tokens"  # what its throughput counts


class Logger:
    """A place to report to. Every method has a default that does nothing."""

    def start(self, run: Run) -> None:
        """Before the first step."""

    def step(self, figures: dict[str, Any]) -> None:
        """After a step: its figures, with those of an evaluation if there was one."""

    def note(self, text: str) -> None:
        """At any time: something that a person should know."""

    def profile(self, report: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        """After the last step: measurements beside predictions; every rank's spans of a step."""

    def finish(self, summary: dict[str, Any]) -> None:
        """After the last step, unless the run breaks off."""

    def close(self) -> None:
        """At the end, always."""


class All(Logger):
    """Several loggers as one."""

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        self._loggers = tuple(loggers)

    def start(self, run: Run) -> None:
        for logger in self._loggers:
            logger.start(run)

    def step(self, figures: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.step(figures)

    def note(self, text: str) -> None:
        for logger in self._loggers:
            logger.note(text)

    def profile(self, report: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        for logger in self._loggers:
            logger.profile(report, ranks, title)

    def finish(self, summary: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.finish(summary)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
