"""What a run may do with any data before it knows the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Progress = Callable[[str, int], None]  # (what is being done, documents or samples so far)


class Data(ABC):
    """Training and held-out data."""

    name: str

    @property
    def left_out(self) -> Mapping[str, int]:
        """What a user's texts or files have that is not read, by kind."""
        return {}

    @property
    def kept(self) -> Path | None:
        """The folder in which what `prepare` made is kept for the next run, if it is."""
        return None

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
