"""BERT's pre-training: find hidden tokens, and tell whether two parts of a row belong together.

The model has to find 15 % of the text's tokens (or whole words); of these 80 % are hidden, 10 %
replaced by any token and 10 % left as they are, drawn anew at each step. With `pairs` a row has two
parts, and the target at its first mark is `yes` or `no`: so there is no second head that strategies
would have to know.

Sources: Devlin et al. 2018 (1810.04805); sentence order: Lan et al. 2019, ALBERT (1909.11942).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain.data.prepare import SPLITS
from dtrain.data.seeded import generator
from dtrain.data.text import Text
from dtrain.data.tokenizer import MARK_IDS
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory
from dtrain.task.base import Sizes, Supervised, Task, positions, single_model
from dtrain.task.batch import Batch, Sums
from dtrain.task.causal_lm import (
    IGNORE,
    checked_sequence_length,
    count_correct,
    count_targets,
    cross_entropy,
    language_metrics,
    pad_batch,
)

PAIRS = (None, "next_sentence", "sentence_order")
HIDDEN, REPLACED = 0.8, 0.1  # shares of the tokens to be found; the others are left as they are


class MaskedLM(Task):
    """An encoder on windows of a corpus. Batches: tokens, positions, targets, segments (B, T).

    Args:
        probability: share of the tokens to be found.
        whole_words: hide words, not tokens.
        pairs: next_sentence (in half of the rows the second part is another row's), sentence_order
            (in half of the rows the parts are swapped), or None.

    Raises:
        ValueError: the model is causal, sizes do not fit, or an option is unknown.
    """

    def __init__(
        self,
        models: dict[str, ModelFactory],
        data: Text,
        sizes: Sizes,
        *,
        probability: float = 0.15,
        whole_words: bool = False,
        pairs: str | None = None,
    ) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"task.probability={probability} must be more than 0 and less than 1")
        if pairs not in PAIRS:
            raise ValueError(
                f"task.pairs={pairs} is unknown: use {', '.join(str(p or 'null') for p in PAIRS)}"
            )
        if pairs == "next_sentence" and sizes.global_batch_size < 2:
            raise ValueError(
                "task.pairs=next_sentence takes parts of other rows: use global_batch_size=2 "
                "or more"
            )
        model = on_meta(single_model(models, "masked_lm"))
        if getattr(model, "causal", False):
            raise ValueError(
                "task masked_lm needs a model that sees both sides: set model.causal=false"
            )
        self.models, self.sizes, self.probability, self.pairs = models, sizes, probability, pairs
        self.marks, self.vocab_size = data.tokenizer.marks, data.vocab_size
        pair_marks = ("between", "yes", "no") if pairs else ()
        data.tokenizer.require_marks(
            "hidden", "first", *pair_marks, reason="masked_lm with pairs" if pairs else "masked_lm"
        )
        self.words = (
            [torch.from_numpy(table) for table in data.tokenizer.words()] if whole_words else None
        )
        seq_len, marks = checked_sequence_length(model, data, sizes.seq_len), 2 if pairs else 1
        if seq_len - marks < 2:
            raise ValueError(f"seq_len={seq_len} leaves no text beside the marks")
        self._windows = {
            side: data.windows(side, seq_len=seq_len - marks - 1, seed=sizes.seed)
            for side in SPLITS
        }
        segmented = pairs and bool(getattr(model, "segments", 0))
        inputs = ("tokens", "positions", *(("segments",) if segmented else ()))
        self.updates = (Supervised("model", inputs, cross_entropy, count_targets, self._measures),)

    @property
    def epoch(self) -> float:
        return self._windows["train"].per_epoch

    def batch(self, step: int) -> Batch:
        rows = self._windows["train"].batch(step, self.sizes.global_batch_size)
        return self._hide(rows, generator(self.sizes.seed, "hide", step))

    def validation(self) -> Iterator[Batch]:
        for index, rows in enumerate(
            self._windows["validation"].sweep(self.sizes.eval_batches, self.sizes.global_batch_size)
        ):
            yield pad_batch(
                self._hide(rows, generator(0, "validation", index)), self.sizes.global_batch_size
            )

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()

    def describe(self, totals: Sums) -> dict[str, float]:
        metrics = language_metrics(super().describe(totals))
        if self.pairs:
            metrics["pair_accuracy"] = float(totals["pairs_correct"] / totals["pairs"])
        return metrics

    def _hide(self, text: Tensor, chance: torch.Generator) -> Batch:
        tokens, answers, segments = self._rows(text, chance)
        marks = torch.tensor(
            [self.marks.end, self.marks.hidden, self.marks.first, self.marks.between]
        )
        chosen = self._draw(tokens, chance) & ~torch.isin(tokens, marks)
        fate = torch.rand(tokens.shape, generator=chance)
        others = torch.randint(MARK_IDS, self.vocab_size, tokens.shape, generator=chance)
        targets = tokens.masked_fill(~chosen, IGNORE)
        tokens = torch.where(chosen & (fate < HIDDEN), self.marks.hidden, tokens)
        tokens = torch.where(chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED), others, tokens)
        if answers is not None:
            targets[:, 0] = answers
        return {
            "tokens": tokens,
            "positions": positions(tokens),
            "targets": targets,
            "segments": segments,
        }

    def _rows(self, text: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return rows with their marks, the answers, and the part that each token belongs to."""

        def column(mark: int) -> Tensor:
            return torch.full((len(text), 1), mark)

        if not self.pairs:
            tokens = torch.cat((column(self.marks.first), text), dim=1)
            return tokens, None, torch.zeros_like(tokens)
        one, other = text.tensor_split(2, dim=1)
        false = (torch.rand(len(text), 1, generator=chance) < 0.5) & (
            len(text) > 1 or self.pairs == "sentence_order"
        )
        between = column(self.marks.between)
        if self.pairs == "next_sentence":
            other = torch.where(false, other.roll(1, dims=0), other)
            parts = torch.cat((one, between, other), dim=1)
        else:
            swapped = torch.cat((other, between, one), dim=1)
            parts = torch.where(false, swapped, torch.cat((one, between, other), dim=1))
        tokens = torch.cat((column(self.marks.first), parts), dim=1)
        answers = torch.where(false[:, 0], self.marks.no, self.marks.yes)
        ends = tokens == self.marks.between
        return tokens, answers, ends.cumsum(1) - ends.long()

    def _draw(self, tokens: Tensor, chance: torch.Generator) -> Tensor:
        """Draw which tokens are to be found: single tokens, or whole words by their first token."""
        draws = torch.rand(tokens.shape, generator=chance)
        if self.words is not None:
            begins, ends = self.words
            starts = torch.ones_like(tokens, dtype=torch.bool)
            starts[:, 1:] = ~(begins[tokens[:, 1:]] & ends[tokens[:, :-1]])
            draws = draws.gather(1, starts.long().cumsum(1) - 1)
        return draws < self.probability

    def _measures(self, logits: Tensor, batch: Batch) -> Sums:
        measured = count_correct(logits, batch)
        if self.pairs:
            asked = (batch["targets"] == self.marks.yes) | (batch["targets"] == self.marks.no)
            right = (logits.argmax(-1) == batch["targets"]) & asked
            measured |= {"pairs": asked.sum(), "pairs_correct": right.sum()}
        return measured
