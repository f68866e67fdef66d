"""Exchange Python objects between ranks, and raise one rank's error on all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def all_gather_object(own: T) -> list[T]:
    """Return what each rank gives, by rank. Collective: every rank calls it."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return by_rank


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `function` on rank 0; every rank returns its result or raises its error, whatever it is.

    Collective: every rank calls it.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = list(_outcome(function))
    dist.broadcast_object_list(outcome, src=0, group=group)
    result: T
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `function` on every rank; each returns all results by rank, or raises the first error.

    Collective: every rank calls it.
    """
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, _outcome(function), group=group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return a result, or an error that can be sent.

    A rank that raised alone would leave the others waiting for it.
    """
    try:
        return function(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # another rank cannot make its class
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
