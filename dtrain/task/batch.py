"""What tasks, strategies and the loop hand to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Batch = dict[str, Tensor]  # every tensor has one row per sample: rows are dim 0, tokens dim 1
Models = dict[str, nn.Module]
Sums = dict[str, Tensor]  # sums over a batch's items, by name


class Stages(nn.ModuleList):
    """Several pieces of one model on one rank; each names its parameters in full."""


def pieces(model: nn.Module) -> list[nn.Module]:
    """The pieces of a model that this rank holds: most often the model itself."""
    return list(model) if isinstance(model, Stages) else [model]


def divide(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch's rows in `parts` equal parts.

    Raises:
        ValueError: the rows do not come out even.
    """
    for name, tensor in batch.items():
        if len(tensor) % parts:
            raise ValueError(
                f"{len(tensor)} rows of {name!r} do not divide into {parts} equal parts"
            )
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    for index in range(parts):
        yield {name: tensors[index] for name, tensors in chunks.items()}


@contextmanager
def evaluating(models: Models) -> Iterator[None]:
    """Models in evaluation; then each module is as it was: what its author keeps in evaluation
    stays there.
    """
    were = [(module, module.training) for model in models.values() for module in model.modules()]
    trained = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.train(trained[name])  # which an author may have given more to do
        for module, training in were:
            module.training = training
