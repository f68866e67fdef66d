"""Language modelling: predict each next token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.data.augment import TextChange, augmentations
from dtrain.data.rows import Rows
from dtrain.data.seeded import generator
from dtrain.data.text import Text
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory, sequence_length
from dtrain.task.base import Sizes, Supervised, Task, at_least_fp32, positions, single_model
from dtrain.task.batch import Batch, Sums

IGNORE = -100  # a target that does not count
FILL = -1  # in the place of tokens that a change of the row has left out


class CausalLM(Task):
    """A GPT on windows of a corpus. Batches: tokens, positions, targets, each (B, T).

    Args:
        augment: changes of the training rows; hidden tokens are inputs only, no targets.

    Raises:
        ValueError: there are several models, the tokenizer or the sequence is too large for the
            model, or there is too little text.
    """

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Text,
        sizes: Sizes,
        *,
        augment: Mapping[str, TextChange] | None = None,
    ) -> None:
        self.augment = augmentations(augment, TextChange, "texts")
        self.seed = sizes.seed
        self.marks = data.tokenizer.marks
        if self.augment:
            data.tokenizer.require_marks("hidden", reason="task.augment")
        model = on_meta(single_model(models, "causal_lm"))
        if getattr(model, "causal", True) is False:
            raise ValueError(
                "task causal_lm needs a model that sees one side only: set model.causal=true"
            )
        self.models = models
        self._batch_size = sizes.global_batch_size
        self._eval_batches = sizes.eval_batches
        seq_len = checked_sequence_length(model, data, sizes.seq_len)
        self._train = data.windows("train", seq_len=seq_len, seed=sizes.seed)
        self._validation = data.windows("validation", seq_len=seq_len, seed=sizes.seed)
        self.updates = (
            Supervised(
                "model", ("tokens", "positions"), cross_entropy, count_targets, count_correct
            ),
        )

    @property
    def epoch(self) -> float:
        return self._train.per_epoch

    def batch(self, step: int) -> Batch:
        rows = self._train.batch(step, self._batch_size)
        if not self.augment:
            return _pairs(rows)
        changed = [
            self._changed(row, generator(self.seed, "augment", step, place))
            for place, row in enumerate(rows)
        ]
        batch = _pairs(torch.stack(changed))
        unknown = (batch["targets"] == self.marks.hidden) | (batch["targets"] == FILL)
        tokens = batch["tokens"].masked_fill(batch["tokens"] == FILL, self.marks.end)
        return batch | {"tokens": tokens, "targets": batch["targets"].masked_fill(unknown, IGNORE)}

    def _changed(self, row: Tensor, chance: torch.Generator) -> Tensor:
        """Return a row after its changes, filled to its length before."""
        ids = row
        for change in self.augment:
            ids = change(ids, len(row), self.marks.hidden, chance)
        return F.pad(ids[: len(row)], (0, max(0, len(row) - len(ids))), value=FILL)

    def validation(self) -> Iterator[Batch]:
        for rows in self._validation.sweep(self._eval_batches, self._batch_size):
            yield pad_batch(_pairs(rows), self._batch_size)

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()

    def describe(self, totals: Sums) -> dict[str, float]:
        return language_metrics(super().describe(totals))


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Sum the loss over the targets that count, in fp32 at least: (B, T, V), (B, T) -> ()."""
    return F.cross_entropy(
        at_least_fp32(logits).flatten(0, 1),
        batch["targets"].flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def count_targets(batch: Batch) -> Tensor:
    """Return the number of targets that count."""
    return (batch["targets"] != IGNORE).sum()


def count_correct(logits: Tensor, batch: Batch) -> Sums:
    """Return how many targets are the most probable token."""
    return {"correct": (logits.argmax(-1) == batch["targets"]).sum()}


def language_metrics(means: dict[str, float]) -> dict[str, float]:
    """Return loss, perplexity and accuracy from the means of loss and correct targets."""
    return {
        "loss": means["loss"],
        "perplexity": math.exp(min(means["loss"], 700.0)),
        "accuracy": means["correct"],
    }


def _pairs(rows: Tensor) -> Batch:  # (B, T + 1) -> inputs and targets, one position apart
    tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
    return {"tokens": tokens, "positions": positions(tokens), "targets": targets}


def pad_batch(batch: Batch, rows: int) -> Batch:
    """Fill the batch up to `rows` with rows that do not count."""
    if missing := rows - len(batch["targets"]):
        batch = {
            name: torch.cat((t, t[:1].expand(missing, *t.shape[1:]))) for name, t in batch.items()
        }
        batch["targets"][-missing:] = IGNORE
    return batch


def checked_sequence_length(
    model: nn.Module | None, data: Text | Rows, seq_len: int | None, outputs: int | None = None
) -> int:
    """Return the sequence length.

    Raises:
        ValueError: it, the vocabulary or the outputs do not fit the model.
    """
    if (model_outputs := getattr(model, "outputs", outputs)) != outputs:
        raise ValueError(
            f"model.outputs={'null' if model_outputs is None else model_outputs}: the task needs "
            f"{outputs or 'null: the vocabulary'}"
        )
    length, vocab_size = sequence_length(model, seq_len), getattr(model, "vocab_size", None)
    if vocab_size and data.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is less than the tokenizer's {data.vocab_size} ids: "
            f"set model.vocab_size={data.vocab_size}"
        )
    return length
