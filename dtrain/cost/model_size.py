"""Tell a model's sizes from its shapes: nothing is allocated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.config.user_code import error_in_words
from dtrain.cost import flops
from dtrain.model.initialize import on_meta
from dtrain.model.layout import ModelFactory, layout_of, sequence_length
from dtrain.parallel.precision import Precision

MOMENTS = 2  # Adam keeps two numbers for each weight


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model; bytes are of one copy, on any number of ranks."""

    parameters: dict[str, int]  # by part; a tied matrix counts once, where it is first used
    seq_len: int
    flops_per_token: float  # forward and backward, at seq_len
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def model_size(factory: ModelFactory, precision: Precision, seq_len: int | None) -> ModelSize:
    """Count a language model: (B, T) tokens in, logits out.

    Raises:
        ValueError: no sequence length, or one beyond the model's context; the model does not run on
            meta tensors.
    """
    model = on_meta(factory)
    if model is None:
        raise ValueError("the model cannot be built on the meta device: it computes with values")
    length = sequence_length(model, seq_len)
    tokens = torch.zeros((1, length), dtype=torch.long, device="meta")
    positions = torch.zeros_like(tokens)
    try:
        operations = flops.count(lambda: model(tokens, positions).sum())
    except Exception as error:  # of a user's model: it may fail in any way
        raise ValueError(
            f"the model does not run on meta tensors, so its operations cannot be told: "
            f"{error_in_words(error)}"
        ) from error
    size = torch.finfo(precision.weights_dtype).bits // 8
    total = sum(p.numel() for p in model.parameters())
    return ModelSize(
        parameters=_by_part(model),
        seq_len=length,
        flops_per_token=operations / length,
        weight_bytes=total * size,
        gradient_bytes=total * size,
        optimizer_bytes=MOMENTS * total * size,
    )


def _by_part(model: nn.Module) -> dict[str, int]:
    """Return numbers of parameters by module; of all blocks together, by module within a block."""
    blocks = layout_of(model).blocks
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if blocks and name.startswith(f"{blocks}."):
            inner = name.removeprefix(f"{blocks}.").split(".")
            counts[f"{blocks}: {inner[1]}"] += parameter.numel()
        else:
            counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)
