"""Types that tasks, strategies and the loop share: batches, models, sums, and pieces of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Batch = dict[str, Tensor]  # every tensor has one row per sample: rows are dim 0, tokens dim 1
Models = dict[str, nn.Module]
Sums = dict[str, Tensor]  # sums over a batch's items, by name


class Stages(nn.ModuleList):
    """Several pieces of one model on one rank, each with its parameters' full names."""


def pieces(model: nn.Module) -> list[nn.Module]:
    """Return the pieces of a model on this rank: usually the model itself."""
    return list(model) if isinstance(model, Stages) else [model]


def divide(batch: Batch, parts: int) -> Iterator[Batch]:
    """Divide the batch's rows into equal parts.

    Raises:
        ValueError: the number of rows is not divisible.
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
    """Set models to evaluation, then each module to its mode before.

    So modules that a user keeps in evaluation stay there.
    """
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    trained = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for name, model in models.items():
            model.train(trained[name])  # a user's `train` may do more
        for module, training in modes:
            module.training = training
