"""A model of somebody else's by its `_target_` alone: it is given what its constructor takes.

`model._target_=mymodel.MyModel` leaves the other settings of the group (vocab_size, context, ...)
in place: those that the constructor names are handed over, the others are dtrain's own models'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from inspect import Parameter, signature
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from dtrain.config import secret
from dtrain.config.build import build, imported
from dtrain.config.groups import CONFIGS

SAID = (
    "vocab_size",
    "context",
)  # what a model says of itself: that which it was given, if it does not


def build_model(node: Mapping[str, Any], where: str, vocab_size: int | None) -> nn.Module:
    """The model of a node of the configuration.

    Args:
        vocab_size: of the data's tokenizer, for a constructor that asks for it and is told nothing.

    Raises:
        ValueError: it cannot be built, or needs what nobody has said.
    """
    takes = _parameters(node)
    if takes is None:
        return build(node, nn.Module, where)
    given = accepted_settings(node)
    if "vocab_size" in takes and vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    needed = [
        p.name
        for p in takes.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(
            f"{where}: {node['_target_']} needs {', '.join(missing)}: set +{where}.{missing[0]}=…"
        )
    model = build(given, nn.Module, where)
    for name in SAID:
        if name in given and not hasattr(model, name):
            setattr(model, name, given[name])
    return model


def accepted_settings(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node without those settings of dtrain's models that its constructor does not take."""
    takes = _parameters(node)
    if takes is None or any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
        return dict(node)
    return {
        key: value
        for key, value in node.items()
        if key in takes or key.startswith("_") or key not in _ours()
    }


def check_asked(model: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a setting of the command line that the model's constructor does not take.

    Raises:
        ValueError: names it, and what the constructor takes.
    """
    kept, takes = accepted_settings(model), _parameters(model)
    for key in (override.split("=", 1)[0].lstrip("+") for override in overrides if "=" in override):
        name = key.removeprefix("model.").split(".")[0]
        if (
            takes is not None
            and key.startswith("model.")
            and not name.startswith("_")
            and name not in kept
        ):
            known = ", ".join(takes) or "nothing"
            raise ValueError(f"{key}: {model['_target_']} takes {known}")


def settings_in_words(model: Mapping[str, Any]) -> Iterator[str]:
    """For a person: what a model that is not ours is given."""
    if _parameters(model) is not None:
        given = ", ".join(
            secret.masked_setting(key, value)
            for key, value in accepted_settings(model).items()
            if not key.startswith("_")
        )
        yield f"{model['_target_']} is given {given or 'nothing'}"


def _parameters(node: Mapping[str, Any]) -> Mapping[str, Parameter] | None:
    """What the constructor takes; None for a class of dtrain's, or what cannot be asked."""
    target = node.get("_target_")
    if not isinstance(target, str) or target.split(".")[0] == "dtrain":
        return None
    try:
        return signature(imported(target, "model._target_")).parameters
    except (ValueError, TypeError):
        return None


@cache
def _ours() -> frozenset[str]:
    """Every setting of every model that comes with dtrain."""
    files = (CONFIGS / "model").glob("*.yaml")
    return frozenset(str(key) for file in files for key in OmegaConf.load(file))
