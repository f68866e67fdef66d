"""Build a user's model from its `_target_` alone: pass the settings that its constructor takes.

`model._target_=mymodel.MyModel` leaves the group's other settings (vocab_size, context, ...) in
place. The constructor gets those that it names; the others are for dtrain's own models.
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

# attributes that a model gets from its settings, if it does not set them
DESCRIBING = ("vocab_size", "context")


def build_model(node: Mapping[str, Any], where: str, vocab_size: int | None) -> nn.Module:
    """Build the model of a node of the configuration.

    Args:
        vocab_size: of the data's tokenizer, for a constructor that takes it where no setting does.

    Raises:
        ValueError: it cannot be built, or a setting is missing.
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
    for name in DESCRIBING:
        if name in given and not hasattr(model, name):
            setattr(model, name, given[name])
    return model


def accepted_settings(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node without settings of dtrain's models that its constructor does not take."""
    takes = _parameters(node)
    if takes is None or any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
        return dict(node)
    return {
        key: value
        for key, value in node.items()
        if key in takes or key.startswith("_") or key not in _ours()
    }


def check_asked(model: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ValueError for a setting of the command line that the constructor does not take."""
    accepted, takes = accepted_settings(model), _parameters(model)
    if takes is None:
        return
    for key in (override.split("=", 1)[0].lstrip("+") for override in overrides if "=" in override):
        name = key.removeprefix("model.").split(".")[0]
        if key.startswith("model.") and not name.startswith("_") and name not in accepted:
            names = ", ".join(takes) or "nothing"
            raise ValueError(f"{key}: {model['_target_']} takes {names}")


def settings_in_words(model: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for people: the settings that a user's model is given."""
    if _parameters(model) is not None:
        given = ", ".join(
            secret.masked_setting(key, value)
            for key, value in accepted_settings(model).items()
            if not key.startswith("_")
        )
        yield f"{model['_target_']} is given {given or 'nothing'}"


def _parameters(node: Mapping[str, Any]) -> Mapping[str, Parameter] | None:
    """Return the constructor's parameters; None for dtrain's classes, or if they are unknown."""
    target = node.get("_target_")
    if not isinstance(target, str) or target.split(".")[0] == "dtrain":
        return None
    try:
        return signature(imported(target, "model._target_")).parameters
    except (ValueError, TypeError):
        return None


@cache
def _ours() -> frozenset[str]:
    """Return every setting of every model that comes with dtrain."""
    files = (CONFIGS / "model").glob("*.yaml")
    return frozenset(str(key) for file in files for key in OmegaConf.load(file))
