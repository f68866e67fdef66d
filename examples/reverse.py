"""A task of one's own, in one file: say a row of letters backwards.

    PYTHONPATH=examples torchrun --nproc-per-node 2 scripts/train.py task._target_=reverse.Reverse
    strategy=fsdp

The second half of a row is its first half backwards; only what can be known counts. Every strategy
trains it as one process does, because `batch` depends on the step alone, the loss is a sum, and
`count` says how many it sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dtrain.data.base import Data
from dtrain.data.seeded import generator
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, Task, positions
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import IGNORE, count_correct, count_targets, cross_entropy

LETTERS = range(97, 123)


class Reverse(Task):
    """Batches: tokens, positions, targets, each (B, T)."""

    def __init__(
        self, models: dict[str, ModelFactory], data: Data, sizes: Sizes, letters: int = 8, **_: Any
    ) -> None:
        self.models, self.sizes, self.letters = models, sizes, letters
        self.updates = (
            Supervised(
                "model", ("tokens", "positions"), cross_entropy, count_targets, count_correct
            ),
        )

    def batch(self, step: int) -> Batch:
        return self._rows(generator(self.sizes.seed, "reverse", step))

    def validation(self) -> Iterator[Batch]:
        for index in range(self.sizes.eval_batches):
            yield self._rows(generator(self.sizes.seed, "reverse", "validation", index))

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()

    def _rows(self, chance: torch.Generator) -> Batch:
        shape = (self.sizes.global_batch_size, self.letters)
        half = torch.randint(LETTERS.start, LETTERS.stop, shape, generator=chance)
        row = torch.cat((half, half.flip(1)), dim=1)
        tokens, targets = row[:, :-1], row[:, 1:].clone()
        targets[:, : self.letters - 1] = IGNORE
        return {"tokens": tokens, "positions": positions(tokens), "targets": targets}
