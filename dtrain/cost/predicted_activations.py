"""Predict the activations of a rank: the most bytes that wait for a backward pass at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from dtrain.parallel.footprint import Activation, Footprint


def activations(footprint: Footprint) -> int:
    """Return the most bytes of activations on a rank at one moment of a step.

    In a pipeline: those of every micro-batch that waits for its backward pass, and what recomputing
    a block adds to one of them.
    """
    pieces = footprint.pieces
    if not any(piece.flights for piece in pieces):
        return _peak(activation for piece in pieces for activation in piece.kept)
    waiting = []  # bytes of a micro-batch, by piece
    for piece in pieces:
        backward = min((a.died for a in piece.kept), default=0)  # when it begins
        waiting.append(sum(a.bytes for a in piece.kept if a.born <= backward))
    recomputed = max(_peak(piece.kept) - size for piece, size in zip(pieces, waiting, strict=True))
    curves = (
        [in_flight * size + done * piece.sent for in_flight, done in piece.flights]
        for piece, size in zip(pieces, waiting, strict=True)
    )
    return recomputed + max(map(sum, zip(*curves, strict=True)))


def _peak(activations: Iterable[Activation]) -> int:
    lifetimes = ((a.born, a.died, a.bytes) for a in activations)
    return max(bytes_over_time(lifetimes).values(), default=0)


def bytes_over_time(lifetimes: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """Return the bytes from each moment at which they change, by moment.

    Args:
        lifetimes: (born, died, bytes); both moments are included.
    """
    change: Counter[int] = Counter()
    for born, died, size in lifetimes:
        change[born] += size
        change[died + 1] -= size
    moments = sorted(change)
    return dict(zip(moments, accumulate(change[moment] for moment in moments), strict=True))
