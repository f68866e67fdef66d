"""What every logger may be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cost.timeline import Span


@dataclass(frozen=True)
class Run:
    """What is known when training starts."""

    strategy: str  # as it was asked for
    mesh: dict[str, int]  # ranks along each axis
    world_size: int
    first_step: int  # steps done before
    steps: int
    folder: Path
    facts: tuple[str, ...]  # lines for a person: model, data, precision, threads
    config: dict[str, Any]


class Logger:
    """A place to report to. Every method has a default that does nothing."""

    def start(self, run: Run) -> None:
        """Before the first step."""

    def step(self, figures: dict[str, Any]) -> None:
        """After a step: its figures, those of an evaluation among them where there was one."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def profile(self, found: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        """What the instruments measured beside what was predicted, and what every rank did in
        one step.
        """

    def finish(self, summary: dict[str, Any]) -> None:
        """After the last step. Not called when the run breaks off; `close` is."""

    def close(self) -> None:
        """Always, last."""


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

    def profile(self, found: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        for logger in self._loggers:
            logger.profile(found, ranks, title)

    def finish(self, summary: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.finish(summary)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
