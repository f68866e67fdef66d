"""Call a user's model as (tokens, positions) -> logits, where its signature makes the way clear.

    forward(tokens)                   gets no positions
    forward(tokens, targets=None)     gets neither positions nor targets: its own loss is not used
    returns (logits, loss), {"logits": ...}, or an object with `logits`: the logits are taken

Hooks on the model do it, so that its class, its names and its layout stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.model.layout import is_ours

# names of second arguments that are no positions
OTHERS = {
    "target", "targets", "label", "labels", "y", "mask", "attention_mask", "cache",
    "past_key_values",
}  # fmt: skip


def adapt(model: nn.Module) -> nn.Module:
    """Return the model, with hooks where it is a user's.

    Raises:
        ValueError: it needs targets in every call, or its weights have no shapes before the first.
    """
    if is_ours(model):
        return model
    if lazy := [
        name for name, each in (*model.named_parameters(), *model.named_buffers()) if is_lazy(each)
    ]:
        raise ValueError(
            f"{lazy[0]} of {type(model).__name__} has no shape before the first call "
            f"(nn.LazyLinear and its kin): give its sizes to the constructor"
        )
    arguments = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
    ]
    second = arguments[1] if len(arguments) > 1 else None
    takes_positions = second is not None and second.name not in OTHERS
    if second is not None and not takes_positions and second.default is second.empty:
        raise ValueError(
            f"{type(model).__name__}.forward({', '.join(p.name for p in arguments)}) wants "
            f"{second.name!r} in every call, and is called with (tokens, positions): make it "
            f"optional ({second.name}=None)"
        )
    if arguments and arguments[0].kind is not arguments[0].VAR_POSITIONAL and not takes_positions:
        model.register_forward_pre_hook(_drop_positions, with_kwargs=True)
    model.register_forward_hook(_take_logits)
    return model


def _drop_positions(
    model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop positions: whole numbers in the tokens' shape; pass on anything else to the model."""
    if len(inputs) == 2 and all(
        isinstance(x, Tensor) and not x.is_floating_point() for x in inputs
    ):
        inputs = inputs[:1] if inputs[0].shape == inputs[1].shape else inputs
    return inputs, {name: value for name, value in named.items() if name not in OTHERS}


def _take_logits(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    named = isinstance(output, Mapping)
    logits = output.get("logits") if named else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list):
        logits = next((each for each in output if isinstance(each, Tensor) and each.ndim > 1), None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives a {type(output).__name__}: it must give logits, a "
            f"tensor (B, T, V), alone, first in a tuple, or named `logits`"
        )
    return logits
