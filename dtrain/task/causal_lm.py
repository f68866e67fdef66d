"""Language modelling: predict each next token."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.batch import Batch, ModelFactory, Sums
from dtrain.data.text import Text
from dtrain.initialize import on_meta
from dtrain.layout import sequence_length
from dtrain.task.base import Sizes, Supervised, Task

IGNORE = -100  # a target that does not count


class CausalLM(Task):
    """A GPT on windows of a corpus. Batches: tokens, positions, targets, each (B, T).

    Raises:
        ValueError: several models, a tokenizer or a sequence too large for the model, too little text.
    """

    def __init__(self, models: dict[str, ModelFactory], data: Text, sizes: Sizes) -> None:
        if set(models) != {"model"}:
            raise ValueError(f"task causal_lm trains one model, the configuration has {', '.join(models)}")
        model = on_meta(models["model"])
        self.models, self._batch_size, self._eval_batches = (
            models,
            sizes.global_batch_size,
            sizes.eval_batches,
        )
        seq_len = fitting(model, data, sizes.seq_len)
        self._train = data.windows("train", seq_len=seq_len, seed=sizes.seed)
        self._validation = data.windows("validation", seq_len=seq_len, seed=sizes.seed)
        self.updates = (Supervised("model", ("tokens", "positions"), cross_entropy, valid, correct),)

    def batch(self, step: int) -> Batch:
        return _pairs(self._train.batch(step, self._batch_size))

    def validation(self) -> Iterator[Batch]:
        for rows in self._validation.sweep(self._eval_batches, self._batch_size):
            batch = _pairs(rows)
            if missing := self._batch_size - len(rows):  # fill up with rows that do not count
                batch = {name: torch.cat((t, t[:1].expand(missing, -1))) for name, t in batch.items()}
                batch["targets"][-missing:] = IGNORE
            yield batch

    def size(self, batch: Batch) -> int:
        return batch["tokens"].numel()

    def describe(self, means: dict[str, float]) -> dict[str, float]:
        return {
            "loss": means["loss"],
            "perplexity": math.exp(min(means["loss"], 700.0)),
            "accuracy": means["correct"],
        }


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Summed over the targets that count, in fp32 at least: (B, T, V), (B, T) -> ()."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")


def valid(batch: Batch) -> Tensor:
    """How many targets count."""
    return (batch["targets"] != IGNORE).sum()


def correct(logits: Tensor, batch: Batch) -> Sums:
    """How many targets are the most probable token."""
    return {"correct": (logits.argmax(-1) == batch["targets"]).sum()}


def _pairs(rows: Tensor) -> Batch:  # (B, T + 1) -> inputs and targets, one position apart
    tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return {"tokens": tokens, "positions": positions, "targets": targets}


def fitting(model: nn.Module | None, data: Text, seq_len: int | None) -> int:
    """The sequence length, checked with the vocabulary against what the model says of itself."""
    length, vocab_size = sequence_length(model, seq_len), getattr(model, "vocab_size", None)
    if vocab_size and data.vocab_size > vocab_size:
        raise ValueError(f"model.vocab_size={vocab_size} is less than the tokenizer's {data.vocab_size} ids: "
                         f"set model.vocab_size={data.vocab_size}")  # fmt: skip
    return length
