"""What ranks tell each other besides tensors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def all_gather_object(own: T) -> list[T]:
    """What each rank gives, by rank. A collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `function` on rank 0; every rank returns its result or raises its error, whatever it is.

    A collective.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = list(_outcome(function))
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `function` on every rank; each returns all results by rank, or raises the first error.

    A collective.
    """
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, _outcome(function), group=group)
    for _, error in every:
        if error is not None:
            raise error
    return [result for result, _ in every]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """A result, or an error that can be sent: a rank that raised alone would leave the others
    waiting for it.
    """
    try:
        return function(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # its class cannot be made again elsewhere
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
