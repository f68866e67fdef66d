"""A user's model, called as (tokens, positions) -> logits, where it is clear how it means that.

    forward(tokens)                   is not given positions
    forward(tokens, targets=None)     neither: its own loss is not asked for
    returns (logits, loss), {"logits": ...}, or an object with `logits`: those count

It is done by hooks on the model, so that its class, its names and its layout stay what they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.model.layout import is_ours

OTHERS = {
    "target",
    "targets",
    "label",
    "labels",
    "y",
    "mask",
    "attention_mask",
    "cache",
    "past_key_values",
}


def adapted(model: nn.Module) -> nn.Module:
    """The model itself, with hooks where it is not ours.

    Raises:
        ValueError: it asks for targets in every call, or its first call would tell a weight's
            shape.
    """
    if is_ours(model):
        return model
    if lazy := [
        name for name, each in (*model.named_parameters(), *model.named_buffers()) if is_lazy(each)
    ]:
        raise ValueError(
            f"{lazy[0]} of {type(model).__name__} has no shape before the first call "
            f"(nn.LazyLinear and its kin): "
            f"give its sizes to the constructor"
        )
    taken = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
    ]
    second = taken[1] if len(taken) > 1 else None
    if second is not None and second.name in OTHERS and second.default is second.empty:
        raise ValueError(
            f"{type(model).__name__}.forward({', '.join(p.name for p in taken)}) wants "
            f"{second.name!r} in "
            f"every call, and is called with (tokens, positions): make it optional "
            f"({second.name}=None)"
        )
    if (
        taken
        and taken[0].kind is not inspect.Parameter.VAR_POSITIONAL
        and _has_no_positions(second)
    ):
        model.register_forward_pre_hook(_without_positions, with_kwargs=True)
    model.register_forward_hook(_logits)
    return model


def _has_no_positions(second: inspect.Parameter | None) -> bool:
    return second is None or second.name in OTHERS


def _without_positions(
    model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Numbers as many as the tokens are positions; anything else is for the model to say."""
    if len(inputs) == 2 and all(
        isinstance(x, Tensor) and not x.is_floating_point() for x in inputs
    ):
        inputs = inputs[:1] if inputs[0].shape == inputs[1].shape else inputs
    return inputs, {name: value for name, value in named.items() if name not in OTHERS}


def _logits(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list):
        found = next((each for each in output if isinstance(each, Tensor) and each.ndim > 1), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives a {type(output).__name__}: it must give logits, a "
            f"tensor (B, T, V), "
            f"alone, first in a tuple, or named `logits`"
        )
    return found
