"""Random numbers and orders as functions of (seed, purpose): the same on every rank at any time."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from typing import Any

import numpy
import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Make a generator for one purpose: a step, a sample, an epoch, a parameter."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_everything(seed: int) -> None:
    """Seed torch, Python and numpy: a user's code may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


class Again:
    """A context with Python's and numpy's random states of the time when it was made.

    On leaving it restores the states that it found. Torch's own recomputation restores torch's
    generator alone.
    """

    def __init__(self) -> None:
        self._states = _random_states()

    def __enter__(self) -> None:
        self._outside = _random_states()
        _set_random_states(*self._states)

    def __exit__(self, *_: object) -> None:
        _set_random_states(*self._outside)


def _random_states() -> tuple[Any, Any]:
    return random.getstate(), numpy.random.get_state()


def _set_random_states(python_state: Any, numpy_state: Any) -> None:
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)


@lru_cache(maxsize=8)
def _order(total: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(total, generator=generator(seed, "epoch", epoch)).tolist()


def shuffled_rows(step: int, rows: int, total: int, seed: int) -> list[int]:
    """Return which `rows` of `total` samples a step reads; each epoch has an order of its own."""
    wanted = range(step * rows, (step + 1) * rows)
    return [_order(total, seed, index // total)[index % total] for index in wanted]


def random_subset(total: int, number: int | None, seed: int) -> list[int]:
    """Choose `number` of `total` samples at random; None: all."""
    return torch.randperm(total, generator=generator(seed, "examples"))[:number].tolist()
