"""Build the object that a configuration's node names, after checking class and arguments.

A node is a mapping with a `_target_`: the dotted name of a class. The class must be of the kind
that the place needs, so that a configuration can name nothing else, and what its constructor is
given must fit its signature.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from inspect import signature
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dtrain.config.aliases import RENAMED, moved
from dtrain.config.schema import Config
from dtrain.config.secret import masked_setting, text_without
from dtrain.config.user_code import error_in_words

T = TypeVar("T")
# Keys of a node that are no arguments of its constructor.
HYDRA_KEYS = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")
LARGEST = 10**12  # of whole numbers that classes of ours and torch's are given
# A type of YAML, and the annotations that its values fit, besides Any and object.
FITTING = {str: (str,), bool: (bool,), int: (int, float), float: (float,)}
# Annotations that say something about a value of YAML.
PLAIN = (str, bool, int, float, list, tuple, dict, Mapping)
SHOWN = {type(None): "null", tuple: "list"}  # types, by YAML's names for them
# What torch's optimizers take: their own errors say the value alone.
OPTIMIZER_RANGES = {
    "lr": "0 or more", "eps": "0 or more", "weight_decay": "0 or more", "momentum": "0 or more",
    "betas": "numbers from 0, and below 1",
}  # fmt: skip


def build(
    node: Mapping[str, Any],
    kind: type[T],
    where: str,
    *,
    parts: tuple[type, ...] = (),
    **arguments: Any,
) -> T:
    """Return an instance of the node's `_target_`, which must be a subclass of `kind`.

    Args:
        where: the node's key in the configuration.
        parts: nodes within the node must name subclasses of one of these.
        arguments: what the constructor gets besides the node's own.

    Raises:
        ValueError: no such class, one of another kind, or arguments that it refuses; names the key.
    """
    target = _check_target(node, (kind,), where)
    _check_nested(node, parts, where)
    _check_arguments(target, constructor_arguments(node), arguments, where)
    instance: T = _build_checked({**node, "_partial_": False}, where, **arguments)
    return instance


def constructor_arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a node gives its constructor."""
    return {name: value for name, value in node.items() if name not in HYDRA_KEYS}


def imported(target: str, setting: str, wanted: str = "class of a configuration's") -> Any:
    """Import what a dotted name names: the only place that imports for a configuration.

    Args:
        setting: what the message begins with.
        wanted: what the message says of a module of Python's own.

    Raises:
        ValueError: there is nothing of this name, or it is Python's own.
    """
    # Python's own modules are not even imported: some of them act when they are.
    if target.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{setting} is not a {wanted}")
    module, _, name = target.rpartition(".")
    if not module:
        raise ValueError(
            f"{setting} names no class: write module.Class, such as "
            f"dtrain.model.transformer.Transformer"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # an import may fail in any way
        reason = _import_failure(error, module, name)
        raise ValueError(f"{setting} cannot be imported: {reason}") from error


def _import_failure(error: Exception, module: str, name: str) -> str:
    """Return why an import failed, and where the missing module or name is now, if it moved."""
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or ""
        if not missing or not f"{module}.".startswith(f"{missing}."):
            return f"{error}{moved(missing)}"  # a module that `module` imports
        elsewhere = " on the path of this Python: for one of your own set PYTHONPATH to its folder"
        return f"there is no module {missing}{moved(missing) or elsewhere}"
    if isinstance(error, AttributeError):
        return f"module {module} has no {name}{moved(f'{module}.{name}')}"
    missing_name = re.search(r"^cannot import name '(\w+)' from '([\w.]+)'", str(error))
    if missing_name and (new_place := moved(f"{missing_name[2]}.{missing_name[1]}")):
        return f"{missing_name[0]}{new_place}"
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _check_target(node: Any, kinds: tuple[type, ...], where: str) -> type:
    """Return the class that a node names, which must be a subclass of one of `kinds`."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ValueError(f"{where} has no _target_: nothing says what to build")
    wanted = " or ".join(kind.__name__ for kind in kinds) or "part of it"
    cls = imported(target, f"{where}._target_={target}", wanted)
    if not (isinstance(cls, type) and issubclass(cls, kinds)):
        raise ValueError(f"{where}._target_={target} is not a {wanted}")
    return cls


def _check_nested(node: Any, parts: tuple[type, ...], where: str) -> None:
    """Check the classes and arguments of all nodes within a node or list."""
    for name, child in node.items() if isinstance(node, Mapping) else enumerate(node):
        if isinstance(child, Mapping) and "_target_" in child:
            cls = _check_target(child, parts, f"{where}.{name}")
            _check_arguments(cls, constructor_arguments(child), {}, f"{where}.{name}")
        if isinstance(child, Mapping | list):
            _check_nested(child, parts, f"{where}.{name}")


def _check_arguments(target: type, given: dict[str, Any], more: dict[str, Any], where: str) -> None:
    """Check names and plain types of a constructor's arguments, as far as its signature says.

    Args:
        given: by the node.
        more: objects from elsewhere, such as a task's data.
    """
    try:
        signature(target).bind(**given, **more)
    except TypeError as error:
        name = next((name for name in given if f"{error}".endswith(f"argument '{name}'")), "")
        new_name = RENAMED.get(f"{where}.{name}", "")
        hint = f": here it is {new_name}" if new_name else ""
        raise ValueError(f"{where}: {error}{hint}") from None
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of what is imported for types alone
        hints = get_type_hints(getattr(target, "__init__"))  # noqa: B009  mypy forbids the plain form
    for name, value in more.items():
        kind = hints.get(name)
        if isinstance(kind, type) and kind is not Any and not isinstance(value, kind):
            raise ValueError(
                f"{where} {target.__name__} takes {kind.__name__}, and "
                f"{name}={getattr(value, 'name', value)} are {type(value).__name__}: "
                f"choose other {name} (docs/tasks.md)"
            )
    for name, value in given.items():
        setting = f"{where}.{name}"
        # A user's own class may have a use for any number.
        if target.__module__.partition(".")[0] in ("dtrain", "torch"):
            _check_number(value, setting)
        if wanted := misfit(value, hints.get(name, object)):
            given_type = "" if isinstance(value, list) else f", not {type(value).__name__}"
            raise ValueError(f"{masked_setting(setting, value)} must be {wanted}{given_type}")


def _check_number(value: Any, setting: str) -> None:
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{setting}={value} must be a finite number")
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{setting}={value} is larger than {LARGEST:,}")


def misfit(value: Any, hint: Any) -> str:
    """Return what a value should be by its annotation; empty: it fits, or nobody can tell."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in allowed]
    if isinstance(value, list) and kinds == [tuple]:
        length = len(get_args(hint))
        any_length = not length or ... in get_args(hint)
        return "" if any_length or len(value) == length else f"a list of {length}"
    if type(value) not in FITTING or not any(kind in PLAIN for kind in kinds):
        return ""
    if any(kind in (Any, object, *FITTING[type(value)]) for kind in kinds):
        return ""
    return " or ".join(SHOWN.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


def _build_checked(node: Any, where: str, **more: Any) -> Any:
    """Build what was checked, as it stands: nothing is resolved again.

    So no text becomes an interpolation.
    """
    if isinstance(node, list):
        return [_build_checked(each, f"{where}.{number}") for number, each in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    within = {name: _build_checked(child, f"{where}.{name}") for name, child in node.items()}
    if "_target_" not in node:
        return within
    target, positional = imported(node["_target_"], f"{where}._target_"), within.get("_args_", [])
    if node.get("_recursive_") is False:
        within = dict(node)
    try:
        call = partial(target, *positional, **constructor_arguments(within), **more)
        return call if node.get("_partial_") else call()
    except (MemoryError, OSError):  # of the machine's
        raise
    except Exception as error:  # of a user's class: it may fail in any way
        raise error_with_setting(error, node, where) from error


def error_with_setting(error: Exception, node: Any, where: str) -> Exception:
    """Return a constructor's error with its node's key, and the arguments that its text names.

    A text names an argument by its name or by its value. One that begins with a key of the
    configuration stays as it is.
    """
    text = str(error)
    keys = "|".join(item.name for item in fields(Config))
    if isinstance(error, ValueError) and re.match(rf"({keys})[\w.]*[=: ]", text):
        return error
    given, words = constructor_arguments(node), re.findall(r"-?[\w.]*\w", text)
    names = [name for name in given if name in words] or [
        name for name, value in given.items() if {*map(str, _numbers(value))} & {*words}
    ]
    settings = " or ".join(f"{where}.{name}={given[name]}" for name in names) or where
    ranges = OPTIMIZER_RANGES if str(node.get("_target_")).startswith("torch.optim.") else {}
    takes = [f"{name} takes {ranges[name]}" for name in names if name in ranges]
    if not isinstance(error, ValueError):
        text = f"{error_in_words(error)} (DTRAIN_TRACEBACK=1 shows where)"
    return ValueError(text_without("; ".join([f"{settings}: {text}", *takes]), given, where))


def _numbers(value: Any) -> list[Any]:
    """Return an argument, or those in its list, that are numbers."""
    parts = value if isinstance(value, list) else [value]
    return [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
