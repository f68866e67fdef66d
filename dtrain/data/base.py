"""What a run may do with any data before it knows the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int], None]  # (what is being done, documents or samples so far)


class Data(ABC):
    """Training and held-out data.

    `left_out` says what a user's texts or files have that is not read, by kind, and `kept` in which
    folder what `prepare` made is kept for the next run, if it is.
    """

    name: str
    left_out: Counter[str] = Counter()
    kept: Path | None = None

    @abstractmethod
    def prepare(self, progress: Progress) -> None:
        """Make ready to read, once; any number of processes may call it at the same time.

        Raises:
            ValueError: nothing to read, or something that cannot be read.
        """

    def leave(self, folder: Path) -> None:  # noqa: B027
        """Put beside a run what its model needs to be used: a tokenizer, say."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a run's summary says of its data."""
