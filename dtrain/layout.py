"""What a model tells every strategy about itself, and nothing more.

A model declares one `Layout`; a strategy reads it. Neither imports the other, so a new model works
with every strategy and a new strategy with every model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Module paths of a model by their role; `*` stands for any block.

    Args:
        first: the module that turns the batch into activations (a pipeline's entry).
        blocks: the container of repeated blocks: units of sharding, recomputation and cutting.
        last: the module that turns activations into outputs (a pipeline's exit).
        column: linear layers that may be split by output features (heads, hidden units).
        row: linear layers that may be split by input features; each follows a `column` layer.
        attention: within a block, the module that mixes positions: (q, k, v) -> y.
    """

    first: str = ""
    blocks: str = ""
    last: str = ""
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    attention: str = ""


def layout_of(model: nn.Module) -> Layout:
    """The model's own `layout`, or an empty one: then every strategy takes the model as one piece."""
    layout = getattr(model, "layout", None)
    return layout if isinstance(layout, Layout) else Layout()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that are present on this rank, in order; none where the layout names none."""
    path = layout_of(model).blocks
    return list(model.get_submodule(path).children()) if path else []


def sequence_length(model: nn.Module | None, seq_len: int | None) -> int:
    """`seq_len`, or where it is None the longest sequence that the model says it takes (`context`).

    Raises:
        ValueError: it is longer than the model's context, or neither is told.
    """
    context = getattr(model, "context", None)
    if seq_len is None and context is None:
        raise ValueError("the model does not say its context: set seq_len")
    if seq_len and context and seq_len > context:
        raise ValueError(
            f"seq_len={seq_len} is longer than the model's context={context}: use at most {context}, "
            f"or set model.context"
        )
    return int(seq_len or context or 0)
