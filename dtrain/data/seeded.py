"""Chance and order that are functions of (seed, what for): the same on every rank, whatever
came before.
"""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from typing import Any

import numpy
import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator for one purpose: a step, a sample, an epoch, a parameter."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_everything(seed: int) -> None:
    """The global generators of torch, Python and numpy: an author may draw by any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


class Again:
    """A context that begins with Python's and numpy's generators as they were when it was made, and
    leaves them as they were: torch's own recomputation keeps its generator alone.
    """

    def __init__(self) -> None:
        self._begin = random.getstate(), numpy.random.get_state()

    def __enter__(self) -> None:
        self._outside = random.getstate(), numpy.random.get_state()
        self._set(*self._begin)

    def __exit__(self, *_: object) -> None:
        self._set(*self._outside)

    @staticmethod
    def _set(own: Any, numpys: Any) -> None:
        random.setstate(own)
        numpy.random.set_state(numpys)


@lru_cache(maxsize=8)
def _order(total: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(total, generator=generator(seed, "epoch", epoch)).tolist()


def shuffled_rows(step: int, rows: int, total: int, seed: int) -> list[int]:
    """Which `rows` of `total` samples a step reads: each is read once an epoch, in an order of
    the epoch's own.
    """
    wanted = range(step * rows, (step + 1) * rows)
    return [_order(total, seed, index // total)[index % total] for index in wanted]


def random_subset(total: int, number: int | None, seed: int) -> list[int]:
    """So many of `total` samples, at random; None: all."""
    return torch.randperm(total, generator=generator(seed, "examples"))[:number].tolist()
