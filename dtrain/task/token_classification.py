"""A tag for each word of a text: named entities, for one."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.data.rows import Rows
from dtrain.data.sources import is_missing
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, single_model
from dtrain.task.batch import Batch
from dtrain.task.causal_lm import IGNORE, checked_sequence_length, count_targets, cross_entropy
from dtrain.task.classifier import Classifier, token_confusion, unique_sorted
from dtrain.task.labelled_rows import RowTask


class TokenClassification(Classifier, RowTask):
    """The tag of each word, at its last token. Batches: tokens, positions, targets, each (B, T).

    Args:
        words: the rows' field of the words, a list.
        tags: the rows' field of their tags, a list of the same length.

    Raises:
        ValueError: a field is missing or of another length, there is only one tag, or sizes do not
            fit.
    """

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Rows,
        sizes: Sizes,
        *,
        words: str = "words",
        tags: str = "tags",
    ) -> None:
        self.models, self.words, self.tags = models, words, tags
        for where, row in data.all():
            _check(where, row, words, tags)
        self.classes = unique_sorted(
            [str(tag) for _, row in data.all() for tag in row[tags]], "tag", data
        )
        model = on_meta(single_model(models, "token_classification"))
        self.length = checked_sequence_length(model, data, sizes.seq_len, len(self.classes))
        self.use_rows(data, sizes)
        self.updates = (
            Supervised(
                "model", ("tokens", "positions"), cross_entropy, count_targets, token_confusion
            ),
        )

    def texts(self, row: dict[str, Any]) -> list[str]:
        return [f"{' ' if index else ''}{word}" for index, word in enumerate(row[self.words])]

    def encode(self, where: str, row: dict[str, Any], chance: torch.Generator | None) -> Batch:
        tokenizer, length = self.data.tokenizer, 1
        tokens = torch.full((self.length,), tokenizer.marks.end)
        targets = torch.full((self.length,), IGNORE)
        tokens[0] = tokenizer.marks.first
        for text, tag in zip(self.texts(row), row[self.tags], strict=True):
            ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))
            if not len(ids):
                continue
            if length + len(ids) > self.length:
                break
            tokens[length : length + len(ids)] = ids
            length += len(ids)
            # at the last token a model that sees one side only has seen the word
            targets[length - 1] = self.classes.index(str(tag))
        return {"tokens": tokens, "positions": torch.arange(self.length), "targets": targets}


def _check(where: str, row: dict[str, Any], words: str, tags: str) -> None:
    for field in (words, tags):
        if not isinstance(row.get(field), list):
            raise ValueError(
                f"{where}: field {field!r} is no list; it has {', '.join(map(str, row))}: set "
                f"task.words and task.tags"
            )
    if len(row[words]) != len(row[tags]):
        raise ValueError(f"{where}: {len(row[words])} words and {len(row[tags])} tags")
    for field in (words, tags):
        if null := [index for index, value in enumerate(row[field]) if is_missing(value)]:
            raise ValueError(f"{where}: number {null[0]} of {field!r} is null: leave such rows out")
