"""What a run needs of a trainer: of the loop's, or of a parameter server's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from dtrain.task.batch import Models, Sums
from dtrain.train import Settings, Step


class AnyTrainer(Protocol):
    """See `dtrain.train.Trainer`, which has all this and more."""

    settings: Settings
    models: Models
    next_step: int
    tokens: int

    def steps(self) -> Iterator[Step]: ...

    def totals(self) -> Sums: ...

    def state(self) -> dict[str, Tensor]: ...

    def begin(self, fill: Callable[[list[dict[str, Tensor]]], None]) -> None: ...

    def load(self, fill: Callable[[list[dict[str, Tensor]]], None]) -> None: ...
