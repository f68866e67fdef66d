"""What is trained: models, batches, and the updates made from each batch.

Every loss is a sum and every update says how many items the global batch holds; the loop divides.
So rows, tokens, micro-batches and uneven masks change nothing in the gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dtrain.model.layout import ModelFactory
from dtrain.task.batch import Batch, Models, Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Update(Protocol):
    """One backward pass and one optimizer step of one model."""

    @property
    def trains(self) -> str:
        """The name of the model whose weights it changes."""
        ...

    @property
    def second_order(self) -> bool:
        """Does the loss hold gradients of its models, so that backward goes through them twice?"""
        ...

    @property
    def then(self) -> Callable[[Models], None] | None:
        """Called with the models after the optimizer's step, if there is something to do."""
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
    """An update given by its loss alone: for tasks of several models.

    Args:
        trains, loss, count, second_order, then: as of every update.
        measures: (models, batch) -> sums for evaluation; None: the loss and the count.
    """

    trains: str
    loss: Callable[[Models, Batch], Tensor]
    count: Callable[[Batch], Tensor]
    measures: Callable[[Models, Batch], Sums] | None = None
    second_order: bool = False
    then: Callable[[Models], None] | None = None

    def measure(self, models: Models, batch: Batch) -> Sums:
        if self.measures:
            return self.measures(models, batch)
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
    second_order = False
    then = None

    def outputs(self, models: Models, batch: Batch) -> Tensor:
        model = models[self.trains]
        return model(*(as_weights(batch[name], model) for name in self.inputs))

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
    # does its loss compare the tokens of a row, and so take whole outputs?
    mixes_tokens: bool = False
    told: str = ""  # for a person, at the start of a run

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The global batch of a step, from 0: a function of (seed, step), the same on every
        rank.
        """

    @property
    def epoch(self) -> float | None:
        """Rows that are read before one is read again; None: it is not known, or there are no
        such rows.
        """
        return None

    @property
    def followers(self) -> list[str]:
        """Models that are not trained: they follow another one."""
        return sorted(self.models.keys() - {update.trains for update in self.updates})

    def validation(self) -> Iterable[Batch]:
        """Global batches of held-out data, the same at every call; there may be none."""
        return ()

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """Tokens (or samples) in a global batch: what throughput counts."""

    def describe(self, totals: Sums) -> dict[str, float]:
        """Metrics to report, from the sums of every measure over the validation batches: by
        default their means.
        """
        return {
            name: float(total / totals["count"])
            for name, total in totals.items()
            if name != "count"
        }

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        """Pictures of the same sums, by name."""
        return {}


def the_model(models: dict[str, ModelFactory], task: str) -> ModelFactory:
    """The one model of a task that trains one.

    Raises:
        ValueError: the configuration has several.
    """
    if set(models) != {"model"}:
        raise ValueError(
            f"task {task} trains one model, the configuration has {', '.join(models) or 'none'}"
        )
    return models["model"]


def as_weights(x: Tensor, model: nn.Module) -> Tensor:
    """In the number format of the model's weights, if it is one of real numbers: a layer takes
    no other.
    """
    if not x.is_floating_point():
        return x
    weight = next((p for p in model.parameters() if p.is_floating_point()), x)
    return x.to(weight.dtype)


def wide(x: Tensor) -> Tensor:
    """In fp32 at least, to be summed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def positions(tokens: Tensor) -> Tensor:
    """The position of each token in its row: (B, T)."""
    return torch.arange(tokens.shape[1]).expand(len(tokens), -1)
