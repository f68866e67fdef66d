"""The base of tasks on labelled rows: which rows a step reads, and how they become a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from dtrain.data.formats import Row
from dtrain.data.rows import Rows
from dtrain.data.seeded import generator, random_subset, shuffled_rows
from dtrain.task.base import Sizes, Task, check_examples
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import pad_batch

SAMPLED = 500  # rows that are encoded to estimate how much of their texts is cut


class RowTask(Task):
    """A task whose samples are rows of `Rows`; the training rows may be a few of them."""

    length: int  # tokens of a row
    marks_per_row = 1  # tokens of a row that are no text

    def use_rows(self, data: Rows, sizes: Sizes, examples: int | None = None) -> None:
        """Use all rows that are held out, and `examples` of the others, drawn by the seed."""
        check_examples(examples)
        self.data, self.sizes = data, sizes
        self._train = random_rows(data.split["train"], examples, sizes.seed)
        self.summary = (
            f"trains on {len(self._train):,} of {len(data.split['train']):,} rows"
            f"{self._truncation_in_words()}"
        )

    def _truncation_in_words(self) -> str:
        """Say how much of the texts does not fit into rows, estimated from some of them."""
        sampled = self._train[:: max(1, len(self._train) // SAMPLED)]
        room = self.length - self.marks_per_row
        lengths = [
            sum(len(self.data.tokenizer.encode(text)) for text in self.texts(row))
            for _, row in sampled
        ]
        if not (cut := sum(length > room for length in lengths)):
            return ""
        lost = sum(max(0, length - room) for length in lengths) / sum(lengths)
        return (
            f"; {cut:,} of the {len(sampled):,} looked at are longer than seq_len={self.length} "
            f"and cut: {lost:.1%} of the tokens are left out"
        )

    @abstractmethod
    def texts(self, row: dict[str, Any]) -> list[str]:
        """Return the texts of a row that become its tokens."""

    @abstractmethod
    def encode(self, where: str, row: dict[str, Any], chance: torch.Generator | None) -> Batch:
        """Return a row's tensors; `chance` is for changes in training, None in evaluation."""

    @property
    def epoch(self) -> float:
        return len(self._train)

    def batch(self, step: int) -> Batch:
        rows, size, seed = self._train, self.sizes.global_batch_size, self.sizes.seed
        return stack_rows(
            self.encode(*rows[index], generator(seed, "augment", step, place))
            for place, index in enumerate(shuffled_rows(step, size, len(rows), seed))
        )

    def validation(self) -> Iterator[Batch]:
        size = self.sizes.global_batch_size
        rows = random_rows(self.data.split["validation"], self.sizes.eval_batches * size, 0)
        for first in range(0, len(rows), size):
            yield pad_batch(
                stack_rows(self.encode(*row, None) for row in rows[first : first + size]), size
            )

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()


def stack_rows(rows: Iterator[Batch]) -> Batch:
    """Stack the tensors of many rows into one batch."""
    batches = list(rows)
    return {name: torch.stack([row[name] for row in batches]) for name in batches[0]}


def random_rows(rows: list[Row], number: int | None, seed: int) -> list[Row]:
    """Choose `number` of the rows at random; None: all."""
    if number is None or number >= len(rows):
        return rows
    return [rows[i] for i in random_subset(len(rows), number, seed)]
