"""The contract of tasks: models, batches, and the updates made from each batch.

Every loss is a sum, and every update counts the items of the global batch; the loop divides. So
rows, tokens, micro-batches and uneven masks change nothing in the gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dtrain.config.aliases import refuse_earlier_names
from dtrain.model.layout import ModelFactory
from dtrain.task.batch import Batch, Models, Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Update(Protocol):
    """One backward pass and one optimizer step of one model."""

    @property
    def trains(self) -> str:
        """The name of the model whose weights the update changes."""
        ...

    @property
    def second_order(self) -> bool:
        """Whether the loss contains gradients of its models: backward passes through them twice."""
        ...

    @property
    def then(self) -> Callable[[Models], None] | None:
        """A function that is called with the models after the optimizer's step."""
        ...

    def loss(self, models: Models, batch: Batch) -> Tensor:
        """Return the summed loss over the batch's items."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Return the number of items of a global batch that the loss sums over."""
        ...

    def measure(self, models: Models, batch: Batch) -> Sums:
        """Return sums for evaluation: at least `loss` and `count`."""
        ...


@dataclass(frozen=True)
class LossUpdate:
    """An update that is defined by its loss alone, for tasks of several models.

    Args:
        trains: as of every update, like loss, count, second_order and then.
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
    """The update of one model whose outputs are compared with the batch's targets.

    Args:
        trains: the model's name.
        inputs: names of the batch's tensors that are the model's arguments.
        criterion: (outputs, batch) -> summed loss.
        count: batch -> number of items in the sum.
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
        outputs: Tensor = model(*(in_weight_dtype(batch[name], model) for name in self.inputs))
        return outputs

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
    """A run's settings for every task.

    Args:
        seed: of data and noise.
        global_batch_size: rows of a batch over all ranks.
        seq_len: tokens of a row; None: as many as the model takes.
        eval_batches: held-out batches in an evaluation.
    """

    seed: int
    global_batch_size: int
    seq_len: int | None
    eval_batches: int


class Task(ABC):
    """The models, the batches and the updates of a run.

    A constructor takes (models, data, sizes), and raises ValueError if they do not fit together.
    """

    models: dict[str, ModelFactory]
    updates: tuple[Update, ...]
    # whether its loss compares the tokens of a row, and so needs whole outputs
    mixes_tokens: bool = False
    summary: str = ""  # for people, at the start of a run
    unit: str = "tokens"  # what `size` counts, and so the throughput: tokens or samples

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        refuse_earlier_names(cls, Task, {"told": "summary"})

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return the global batch of a step (from 0), which depends on (seed, step) alone."""

    @property
    def epoch(self) -> float | None:
        """Number of rows that are read before one is read again; None: unknown, or no rows."""
        return None

    @property
    def followers(self) -> list[str]:
        """Models that are not trained, but follow another one."""
        return sorted(self.models.keys() - {update.trains for update in self.updates})

    def validation(self) -> Iterable[Batch]:
        """Yield global batches of held-out data, the same at every call; there may be none."""
        return ()

    @abstractmethod
    def size(self, batch: Batch) -> int:
        """Return the tokens (or samples) in a global batch, for the throughput."""

    def describe(self, totals: Sums) -> dict[str, float]:
        """Return metrics from the sums over the validation batches; by default their means."""
        return {
            name: float(total / totals["count"])
            for name, total in totals.items()
            if name != "count"
        }

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        """Draw pictures of the same sums, by name."""
        return {}


def single_model(models: dict[str, ModelFactory], task: str) -> ModelFactory:
    """Return the only model.

    Raises:
        ValueError: the configuration has several, or none.
    """
    if set(models) != {"model"}:
        raise ValueError(
            f"task {task} trains one model, the configuration has {', '.join(models) or 'none'}"
        )
    return models["model"]


def check_examples(examples: int | None) -> None:
    """Raise ValueError for a number of training samples that is not at least 1."""
    if examples is not None and examples < 1:
        raise ValueError(f"task.examples={examples} must be at least 1, or null for all")


def in_weight_dtype(x: Tensor, model: nn.Module) -> Tensor:
    """Convert floating-point inputs to the dtype of the model's weights: layers take no other."""
    if not x.is_floating_point():
        return x
    weight = next((p for p in model.parameters() if p.is_floating_point()), x)
    return x.to(weight.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert 16-bit numbers to fp32, to be summed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def positions(tokens: Tensor) -> Tensor:
    """Return the position of each token in its row: (B, T)."""
    return torch.arange(tokens.shape[1]).expand(len(tokens), -1)
