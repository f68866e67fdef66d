"""What a constructor has to say of the arguments that a configuration gives it, in words of the
configuration.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from dtrain.config.aliases import moved
from dtrain.config.secret import text_without

NOT_THEIRS = (
    os.path.dirname(os.path.dirname(__file__)),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)
# keys of a node that are no arguments
HYDRAS = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")
RANGES = {  # of torch's optimizers, whose words have the value alone
    "lr": "0 or more", "eps": "0 or more", "weight_decay": "0 or more", "momentum": "0 or more",
    "betas": "numbers from 0, and below 1",
}  # fmt: skip
PLAIN = (str, bool, int, float, list, tuple, dict, Mapping)  # types of which a value of YAML can be


def arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a node gives its constructor."""
    return {name: value for name, value in node.items() if name not in HYDRAS}


def imported(target: str, said: str, wanted: str = "class of a configuration's") -> Any:
    """What stands under a dotted name. All that configurations name is imported here.

    Raises:
        ValueError: nothing does, or Python's own, which is not `wanted`; `said` names the setting.
    """
    # not even imported: some of these do things then
    if target.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{said} is not a {wanted}")
    module, _, name = target.rpartition(".")
    if not module:
        raise ValueError(
            f"{said} names no class: write module.Class, such as "
            f"dtrain.model.transformer.Transformer"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        # one that it imports itself
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{said} cannot be imported: {error}{moved(error.name or '')}"
            ) from error
        if gone := moved(error.name):
            raise ValueError(
                f"{said} cannot be imported: there is no module {error.name}{gone}"
            ) from error
        raise ValueError(
            f"{said} cannot be imported: there is no module {error.name} on the path of this "
            f"Python: for "
            f"one of your own set PYTHONPATH to its folder"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"{said} cannot be imported: module {module} has no {name}{moved(target)}"
        ) from error
    except Exception as error:
        # an import may fail in any way; its own message is the best there is
        lacking = re.search(r"^cannot import name '(\w+)' from '([\w.]+)'", str(error))
        if lacking and (gone := moved(f"{lacking[2]}.{lacking[1]}")):
            raise ValueError(f"{said} cannot be imported: {lacking[0]}{gone}") from error
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{said} cannot be imported: {last_line}") from error


def misfit(value: Any, hint: Any) -> str:
    """What a value should be that does not fit an annotation of plain types; empty: it fits, or
    nobody can tell.
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in allowed]
    if isinstance(value, list) and kinds == [tuple]:
        number = len(get_args(hint))
        return (
            f"a list of {number}"
            if number and ... not in get_args(hint) and len(value) != number
            else ""
        )
    if type(value) not in (str, bool, int, float) or not any(kind in PLAIN for kind in kinds):
        return ""
    if (
        object in kinds
        or Any in kinds
        or type(value) in kinds
        or (type(value) is int and float in kinds)
    ):
        return ""
    names = {type(None): "null", tuple: "list"}
    return " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


def error_in_words(error: Exception) -> str:
    """An error of somebody else's code, and the line of theirs in which it was raised, if one
    of it is theirs.
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(("<", *NOT_THEIRS))
    ]
    place = (
        f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    )
    return f"{type(error).__name__}: {text}"[:200].rstrip(": ") + place


def named(error: Exception, node: Any, where: str, keys: Collection[str]) -> Exception:
    """What a constructor refuses, told with the key of its node, and of the argument if its text
    names one.

    A text names an argument by its name, or by its value. One that begins with one of `keys` stays
    as it is.
    """
    text = str(error)
    if isinstance(error, ValueError) and re.match(rf"({'|'.join(keys)})[\w.]*[=: ]", text):
        return error
    given, words = arguments(node), re.findall(r"-?[\w.]*\w", text)
    found = [name for name in given if name in words]
    found = found or [
        name for name, value in given.items() if {*map(str, _numbers(value))} & {*words}
    ]
    settings = " or ".join(f"{where}.{name}={given[name]}" for name in found) or where
    ranges = RANGES if str(node.get("_target_")).startswith("torch.optim.") else {}
    takes = [f"{name} takes {ranges[name]}" for name in found if name in ranges]
    said = (
        text
        if isinstance(error, ValueError)
        else f"{error_in_words(error)} (DTRAIN_TRACEBACK=1 shows where)"
    )
    return ValueError(text_without("; ".join([f"{settings}: {said}", *takes]), given, where))


def _numbers(value: Any) -> list[Any]:
    """An argument, or those in it."""
    parts = value if isinstance(value, list) else [value]
    return [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
