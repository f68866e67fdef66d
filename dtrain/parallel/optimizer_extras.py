"""Compare what an optimizer keeps besides the state of each weight.

Such as counts, lists, generators, and other optimizers in it.
"""

from __future__ import annotations

import math
import pickle
import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

HOOKS = "_optimizer_"  # begins the names of torch's own hooks


def extra_state(optimizer: Optimizer, tolerance: float) -> dict[str, Kept]:
    """Return all extra state by the names that its author knows, without what a checkpoint has."""
    places = {
        id(p): place
        for place, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    extras: dict[str, Any] = {}
    for key, value in vars(optimizer).items():
        if key not in ("param_groups", "state", "defaults") and not key.startswith(HOOKS):
            extras[f"its {key}"] = value
    for number, group in enumerate(optimizer.param_groups):
        extras |= {
            f"{key!r} of group {number}": value for key, value in group.items() if key != "params"
        }
    extras |= {
        f"{key!r} of its state": value
        for key, value in optimizer.state.items()
        if id(key) not in places
    }
    saved = {id(each): each for each in (optimizer, optimizer.state, *optimizer.state.values())}
    return {name: Kept(value, places, saved, tolerance) for name, value in extras.items()}


class Kept:
    """A copy of a value to its depths, which can be compared with a later one."""

    def __init__(
        self,
        value: object,
        places: Mapping[int, int],
        saved: Mapping[int, object],
        tolerance: float,
    ) -> None:
        self.places, self.tolerance = places, tolerance
        self.leaves = dict(self._walk(value, "", dict(saved)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept) or self.leaves.keys() != other.leaves.keys():
            return False
        return all(
            _equal(leaf, other.leaves[path], self.tolerance) for path, leaf in self.leaves.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def _walk(self, value: Any, path: str, seen: dict[int, object]) -> Iterator[tuple[str, object]]:
        if id(value) in self.places:
            yield path, ("weight", self.places[id(value)])
        elif isinstance(value, Tensor):
            yield path, value.detach().clone()
        elif value is None or isinstance(value, int | float | complex | str | bytes):
            yield path, value
        elif id(value) in seen:
            return
        elif isinstance(value, type) or callable(value) and not hasattr(value, "forward"):
            yield path, type(value)
        else:
            seen[id(value)] = value  # kept, so that its id stays its own
            inner = list(_within(value))
            yield (
                path,
                (type(value), None if inner or hasattr(value, "__dict__") else _frozen(value)),
            )
            for key, each in inner:
                yield from self._walk(each, f"{path}/{self.places.get(id(key), key)}", seen)


def _within(value: Any) -> Iterator[tuple[object, object]]:
    """Yield what a container or an object holds, by key."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple | deque):
        yield from enumerate(value)
    elif isinstance(value, torch.Generator):
        yield "state", value.get_state()
    elif isinstance(value, random.Random):
        yield "state", value.getstate()
    else:
        yield from getattr(value, "__dict__", {}).items()


def _frozen(value: object) -> bytes | None:
    """Return an array, a set or another library's generator as bytes to compare, never to load."""
    try:
        return pickle.dumps(value)
    except (AttributeError, NotImplementedError, TypeError, pickle.PicklingError):
        return None


def _equal(one: object, other: object, tolerance: float) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(
            one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    if isinstance(one, float) and isinstance(other, float):
        return (
            math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
            or one != one
            and other != other
        )
    return one is other or one == other
