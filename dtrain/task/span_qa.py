"""Span question answering: where in a text the answer begins and ends.

    first mark | question | mark between | text

The model's two outputs for each token are scores of the answer's begin and end, each with a softmax
over the row's tokens. A text that is too long is cut around its answer, in training and evaluation:
that is easier than to search all of it. Source: Devlin et al. 2018 (1810.04805), section 4.2; data:
Rajpurkar et al. 2016 (1606.05250).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrain.data.rows import Rows
from dtrain.data.seeded import generator
from dtrain.data.sources import text_of
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, at_least_fp32, single_model
from dtrain.task.batch import Batch, Sums
from dtrain.task.causal_lm import IGNORE, checked_sequence_length, cross_entropy
from dtrain.task.labelled_rows import RowTask

FIELDS = ("context", "question", "answer", "start")
SHORTEST = 8  # tokens of a row


class SpanQA(RowTask):
    """Begin and end of an answer. Batches: tokens, positions (B, T), targets (B, 2).

    Raises:
        ValueError: a field is missing, or sizes do not fit.
    """

    mixes_tokens = True
    marks_per_row = 2

    def __init__(self, models: dict[str, ModelFactory], data: Rows, sizes: Sizes) -> None:
        self.models = models
        for where, row in data.all():
            _check(where, row)
        self.length = checked_sequence_length(
            on_meta(single_model(models, "span_qa")), data, sizes.seq_len, 2
        )
        if self.length < SHORTEST:
            raise ValueError(
                f"seq_len={self.length} is too short for a question and its text: use "
                f"{SHORTEST} or more"
            )
        data.tokenizer.require_marks("first", "between", reason="span_qa")
        self.use_rows(data, sizes)
        self.updates = (
            Supervised("model", ("tokens", "positions"), _criterion, _count, _measures),
        )

    def texts(self, row: dict[str, Any]) -> list[str]:
        return [row["question"], row["context"]]

    def encode(self, where: str, row: dict[str, Any], chance: torch.Generator | None) -> Batch:
        tokenizer, start = self.data.tokenizer, row["start"]
        pieces = (
            row["question"],
            row["context"][:start],
            row["answer"],
            row["context"][start + len(row["answer"]) :],
        )
        question, before, answer, after = (
            tokenizer.encode(piece).astype("int64").tolist() for piece in pieces
        )
        head = [tokenizer.marks.first, *question[: self.length // 2 - 2], tokenizer.marks.between]
        answer = answer[: self.length - len(head)]
        spare = self.length - len(head) - len(answer)
        # How many tokens stay before the answer is drawn for each row, always in the same way.
        least, most = min(max(0, spare - len(after)), len(before)), min(spare, len(before))
        staying = int(torch.randint(least, most + 1, (), generator=generator(0, where)))
        first = len(head) + staying
        tokens = [*head, *before[len(before) - staying :], *answer, *after][: self.length]
        tokens += [tokenizer.marks.end] * (self.length - len(tokens))
        return {
            "tokens": torch.tensor(tokens),
            "positions": torch.arange(self.length),
            "targets": torch.tensor([first, first + len(answer) - 1]),
        }


def _check(where: str, row: dict[str, Any]) -> None:
    if missing := [field for field in FIELDS if field not in row]:
        raise ValueError(
            f"{where} has no field {missing[0]!r}, only {', '.join(map(str, row))}: a question "
            f"has {', '.join(FIELDS)}"
        )
    for field in FIELDS[:3]:
        text_of(row, field, where, "the rows' fields")
    start, answer = row["start"], row["answer"]
    if not isinstance(start, int):
        raise ValueError(
            f"{where}: start={start!r} must be a whole number (CSV has none: use JSON lines)"
        )
    if not answer or row["context"][start : start + len(answer)] != answer:
        raise ValueError(f"{where}: the answer {answer!r} does not stand at character {start}")


def _logits(outputs: Tensor) -> Tensor:  # (B, T, 2) -> (B, 2, T)
    return at_least_fp32(outputs).transpose(1, 2)


def _criterion(outputs: Tensor, batch: Batch) -> Tensor:
    # (B, 2, T), (B, 2)
    return cross_entropy(_logits(outputs), batch) / 2


def _count(batch: Batch) -> Tensor:
    return (batch["targets"][:, 0] != IGNORE).sum()


def _measures(outputs: Tensor, batch: Batch) -> Sums:
    """Count the exact answers, and sum F1 of the tokens that truth and answer share."""
    (begin, end), counts = _logits(outputs).argmax(-1).unbind(1), batch["targets"][:, 0] != IGNORE
    first, last = batch["targets"].unbind(1)
    shared = (torch.minimum(end, last) - torch.maximum(begin, first) + 1).clamp(min=0)
    f1 = 2 * shared / ((end - begin + 1).clamp(min=0) + last - first + 1)
    return {"exact": ((begin == first) & (end == last) & counts).sum(), "f1": (f1 * counts).sum()}
