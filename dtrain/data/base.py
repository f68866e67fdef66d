"""The contract of data: what a run may do with them before it knows the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.config.aliases import refuse_earlier_names

Progress = Callable[[str, int], None]  # (what is being done, documents or samples so far)


class Data(ABC):
    """Training and held-out data.

    Attributes:
        left_out: number of things in the user's texts or files that are not read, by kind.
        cache_folder: where the prepared data are kept for the next run; None: they are not.
    """

    name: str
    left_out: Counter[str] = Counter()
    cache_folder: Path | None = None

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        refuse_earlier_names(cls, Data, {"leave": "save_for_inference", "kept": "cache_folder"})

    @abstractmethod
    def prepare(self, progress: Progress) -> None:
        """Make the data ready to read, once; many processes may call it at the same time.

        Raises:
            ValueError: there is nothing to read, or something cannot be read.
        """

    def save_for_inference(self, folder: Path) -> None:  # noqa: B027
        """Save what the trained model needs to be used, such as the tokenizer."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a run's summary says of its data."""


def check_validation_fraction(fraction: float) -> None:
    """Raise ValueError unless both sides get a share."""
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction={fraction} must be more than 0 and less than 1")
