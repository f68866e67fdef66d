"""What is trained: models, batches, and the updates made from each batch.

Every loss is a sum and every update says how many items the global batch holds; the loop divides. So
rows, tokens, micro-batches and uneven masks change nothing in the gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtrain.batch import Batch, ModelFactory, Models, Sums


class Update(Protocol):
    """One backward pass and one optimizer step of one model."""

    @property
    def trains(self) -> str:
        """The name of the model whose weights it changes."""
        ...

    def loss(self, models: Models, batch: Batch) -> Tensor:
        """The summed loss over the batch's items."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """How many items the loss sums over: called with the global batch."""
        ...

    def measure(self, models: Models, batch: Batch) -> Sums:
        """Sums for evaluation: at least `loss` and `count`."""
        ...


@dataclass(frozen=True)
class LossUpdate:
    """An update given by its loss alone: for tasks of several models."""

    trains: str
    loss: Callable[[Models, Batch], Tensor]
    count: Callable[[Batch], Tensor]

    def measure(self, models: Models, batch: Batch) -> Sums:
        return {"loss": self.loss(models, batch), "count": self.count(batch)}


@dataclass(frozen=True)
class Supervised:
    """The update of one model whose outputs are compared with what the batch says they should be.

    Args:
        trains: the model's name.
        inputs: names of the batch's tensors that are the model's arguments.
        criterion: (outputs, batch) -> summed loss.
        count: batch -> number of items summed.
        measures: (outputs, batch) -> further sums, for evaluation.
    """

    trains: str
    inputs: tuple[str, ...]
    criterion: Callable[[Tensor, Batch], Tensor]
    count: Callable[[Batch], Tensor]
    measures: Callable[[Tensor, Batch], Sums] = lambda outputs, batch: {}

    def outputs(self, models: Models, batch: Batch) -> Tensor:
        return models[self.trains](*(batch[name] for name in self.inputs))

    def loss(self, models: Models, batch: Batch) -> Tensor:
        return self.criterion(self.outputs(models, batch), batch)

    def measure(self, models: Models, batch: Batch) -> Sums:
        return self.measured(self.outputs(models, batch), batch)

    def measured(self, outputs: Tensor, batch: Batch) -> Sums:
        return {
            "loss": self.criterion(outputs, batch),
            "count": self.count(batch),
            **self.measures(outputs, batch),
        }


@dataclass(frozen=True)
class Sizes:
    """What a run asks of every task.

    Args:
        seed: of data and noise.
        global_batch_size: rows of a batch, over all ranks.
        seq_len: tokens of a row; None: as many as the model takes.
        eval_batches: held-out batches in an evaluation.
    """

    seed: int
    global_batch_size: int
    seq_len: int | None
    eval_batches: int


class Task(ABC):
    """The models, the batches and the updates of a run.

    A constructor takes (models, data, sizes), and raises ValueError for what does not fit together.
    """

    models: dict[str, ModelFactory]
    updates: tuple[Update, ...]

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The global batch of a step, from 0: a function of (seed, step), the same on every rank."""

    def validation(self) -> Iterable[Batch]:
        """Global batches of held-out data, the same at every call; there may be none."""
        return ()

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """Tokens (or samples) in a global batch: what throughput counts."""

    def describe(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics to report from the mean of each measure, `loss` among them."""
        return means
