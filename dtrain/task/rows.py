"""What tasks on labelled rows share: which rows a step reads, and what classifiers are measured
by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dtrain.data.rows import Row, Rows
from dtrain.data.seeded import generator, random_subset, shuffled_rows
from dtrain.task.base import Sizes, Task
from dtrain.task.batch import Batch, Sums
from dtrain.task.causal_lm import IGNORE, padded_batch
from dtrain.task.pictures import confusion_matrix

LOOKED_AT = 500  # rows, to say how much of their texts is cut


class OfRows(Task):
    """A task whose samples are rows of a `Rows`, the training ones perhaps a few of them."""

    length: int  # of a row, in tokens
    row_marks = 1  # of these that are no text

    def take(self, data: Rows, sizes: Sizes, examples: int | None = None) -> None:
        """Use these rows: all that are held out, and so many of the others, drawn by the seed."""
        check_examples(examples)
        self.data, self.sizes = data, sizes
        self._train = random_rows(data.split["train"], examples, sizes.seed)
        self.told = (
            f"trains on {len(self._train):,} of {len(data.split['train']):,} rows{self._cut()}"
        )

    def _cut(self) -> str:
        """How much of its texts a row of the sequence length leaves out, in words; of some
        rows, not to read all.
        """
        looked = self._train[:: max(1, len(self._train) // LOOKED_AT)]
        room = self.length - self.row_marks
        lengths = [
            sum(len(self.data.tokenizer.encode(text)) for text in self.texts(row))
            for _, row in looked
        ]
        if not (cut := sum(length > room for length in lengths)):
            return ""
        lost = sum(max(0, length - room) for length in lengths) / sum(lengths)
        return (
            f"; {cut:,} of the {len(looked):,} looked at are longer than seq_len={self.length} "
            f"and cut: {lost:.1%} "
            f"of the tokens are left out"
        )

    @abstractmethod
    def texts(self, row: dict[str, Any]) -> list[str]:
        """What a row's tokens are made of."""

    @abstractmethod
    def encode(self, where: str, row: dict[str, Any], chance: torch.Generator | None) -> Batch:
        """A row's tensors; `chance` for what is changed in training, None in evaluation."""

    @property
    def epoch(self) -> float:
        return len(self._train)

    def batch(self, step: int) -> Batch:
        rows, size, seed = self._train, self.sizes.global_batch_size, self.sizes.seed
        return stacked(
            self.encode(*rows[index], generator(seed, "augment", step, place))
            for place, index in enumerate(shuffled_rows(step, size, len(rows), seed))
        )

    def validation(self) -> Iterator[Batch]:
        size = self.sizes.global_batch_size
        rows = random_rows(self.data.split["validation"], self.sizes.eval_batches * size, 0)
        for first in range(0, len(rows), size):
            yield padded_batch(
                stacked(self.encode(*row, None) for row in rows[first : first + size]), size
            )

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


class Classifier(Task):
    """One whose targets are classes, of whatever."""

    classes: list[str]

    def describe(self, totals: Sums) -> dict[str, float]:
        return {"loss": float(totals["loss"] / totals["count"]), **scores(totals["confusion"])}

    def pictures(self, totals: Sums) -> dict[str, Figure]:
        return {"confusion": confusion_matrix(totals["confusion"], self.classes)}


def token_confusion(logits: Tensor, batch: Batch) -> Sums:
    """The confusion of a classifier of tokens: (B, T, K) logits, (B, T) targets."""
    return {"confusion": confusion(logits.flatten(0, 1), batch["targets"].flatten())}


def stacked(rows: Iterator[Batch]) -> Batch:
    """One batch of many rows."""
    made = list(rows)
    return {name: torch.stack([row[name] for row in made]) for name in made[0]}


def check_examples(examples: int | None) -> None:
    if examples is not None and examples < 1:
        raise ValueError(f"task.examples={examples} must be at least 1, or null for all")


def random_rows(rows: list[Row], number: int | None, seed: int) -> list[Row]:
    """So many of the rows, at random."""
    if number is None or number >= len(rows):
        return rows
    return [rows[i] for i in random_subset(len(rows), number, seed)]


def unique_sorted(labels: Sequence[str], name: str, data: Rows) -> list[str]:
    """The different ones, sorted.

    Raises:
        ValueError: there are fewer than two.
    """
    found = sorted(set(labels))
    if len(found) < 2:
        kinds = f"every {name} is {found[0]!r}" if found else f"there is no {name}"
        raise ValueError(f"data {data.name}: {kinds}: there is nothing to tell apart")
    return found


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How often each class (rows) was taken for each other (columns): (N, K), (N,) -> (K, K),
    in fp64.
    """
    kinds = logits.shape[-1]
    counts = targets != IGNORE
    pairs = targets[counts] * kinds + logits.argmax(-1)[counts]
    return torch.bincount(pairs, minlength=kinds**2).view(kinds, kinds).double()


def scores(matrix: Tensor) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur: from (K, K) counts."""
    right, truth, said = matrix.diag(), matrix.sum(1), matrix.sum(0)
    occurs = (truth + said) > 0
    f1 = 2 * right[occurs] / (truth + said)[occurs]
    return {"accuracy": float(right.sum() / matrix.sum()), "macro_f1": float(f1.mean())}
