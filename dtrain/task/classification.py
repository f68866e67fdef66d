"""Classification of texts: a label for each row.

The label is the head's output for one token: a mark that stands first in the row, or last where the
model sees one side only. Other tokens' outputs do not count. So every strategy that trains a
language model trains a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dtrain.data.augment import TextChange, augmentations
from dtrain.data.rows import Rows
from dtrain.data.sources import is_missing, text_of
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, single_model
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import IGNORE, checked_sequence_length, count_targets, cross_entropy
from dtrain.task.classifier import Classifier, token_confusion, unique_sorted
from dtrain.task.labelled_rows import RowTask


class Classification(Classifier, RowTask):
    """A text's label out of a few. Batches: tokens, positions, targets, each (B, T).

    Args:
        text: the rows' field of the text.
        label: the rows' field of the class.
        examples: labelled rows to train on, drawn by the seed; None: all.
        augment: changes of the training texts, in order.

    Raises:
        ValueError: a field is missing, there is only one class, or sizes do not fit.
    """

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Rows,
        sizes: Sizes,
        *,
        text: str = "text",
        label: str = "label",
        examples: int | None = None,
        augment: Mapping[str, TextChange] | None = None,
    ) -> None:
        self.models = models
        self.augment = augmentations(augment, TextChange, "texts")
        self.text, self.label = text, label
        for where, row in data.all():
            text_of(row, text, where, "task.text")
            if label not in row:
                raise ValueError(
                    f"{where} has no {label!r}, only {', '.join(map(str, row))}: set task.label"
                )
            if is_missing(row[label]) or row[label] == "":
                raise ValueError(
                    f"{where}: field {label!r} is empty or null: leave such rows out, or set "
                    f"task.label"
                )
        self.classes = unique_sorted([str(row[label]) for _, row in data.all()], label, data)
        model = on_meta(single_model(models, "classification"))
        self.causal = bool(getattr(model, "causal", False))
        data.tokenizer.require_marks(
            *[] if self.causal else ["first"],
            *["hidden"] if augment else [],
            reason="classification",
        )
        self.length = checked_sequence_length(model, data, sizes.seq_len, len(self.classes))
        self.use_rows(data, sizes, examples)
        self.updates = (
            Supervised(
                "model", ("tokens", "positions"), cross_entropy, count_targets, token_confusion
            ),
        )

    def texts(self, row: dict[str, Any]) -> list[str]:
        return [row[self.text]]

    def encode(self, where: str, row: dict[str, Any], chance: torch.Generator | None) -> Batch:
        marks, room = self.data.tokenizer.marks, self.length - 1
        ids = torch.from_numpy(self.data.tokenizer.encode(row[self.text]).astype("int64"))
        if chance is not None:
            for change in self.augment:
                ids = change(ids, room, marks.hidden, chance)
        ids = ids[:room]
        tokens, targets = torch.full((self.length,), marks.end), torch.full((self.length,), IGNORE)
        first, mark = (0, len(ids)) if self.causal else (1, 0)
        tokens[first : first + len(ids)], tokens[mark] = ids, marks.first
        targets[mark] = self.classes.index(str(row[self.label]))
        return {"tokens": tokens, "positions": torch.arange(self.length), "targets": targets}
