"""The base of classifiers: their classes, and what they are measured by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dtrain.data.rows import Rows
from dtrain.task.base import Task
from dtrain.task.batch import Batch, Sums
from dtrain.task.causal_lm import IGNORE
from dtrain.task.pictures import draw_confusion_matrix


class Classifier(Task):
    """A task whose targets are classes."""

    classes: list[str]

    def describe(self, totals: Sums) -> dict[str, float]:
        return {"loss": float(totals["loss"] / totals["count"]), **scores(totals["confusion"])}

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        return {"confusion": draw_confusion_matrix(totals["confusion"], self.classes)}


def unique_sorted(labels: Sequence[str], name: str, data: Rows) -> list[str]:
    """Return the different labels, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        kinds = f"every {name} is {classes[0]!r}" if classes else f"there is no {name}"
        raise ValueError(f"data {data.name}: {kinds}: there is nothing to tell apart")
    return classes


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """Count how often a class (row) is taken for another (column): (N, K), (N,) -> (K, K), fp64."""
    classes = logits.shape[-1]
    counts = targets != IGNORE
    pairs = targets[counts] * classes + logits.argmax(-1)[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()


def token_confusion(logits: Tensor, batch: Batch) -> Sums:
    """Return the confusion of a classifier of tokens: (B, T, K) logits, (B, T) targets."""
    return {"confusion": confusion(logits.flatten(0, 1), batch["targets"].flatten())}


def scores(matrix: Tensor) -> dict[str, float]:
    """Return accuracy, and F1 averaged over the classes that occur, from (K, K) counts."""
    right, total = matrix.diag(), matrix.sum(1) + matrix.sum(0)
    occurs = total > 0
    f1 = 2 * right[occurs] / total[occurs]
    return {"accuracy": float(right.sum() / matrix.sum()), "macro_f1": float(f1.mean())}
