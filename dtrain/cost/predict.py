"""The cost of a plan, from shapes alone: what one rank hands to its collectives in a step, and what
it holds.

    trace(task, plan) -> Footprint: one micro-batch of every update, on the meta device
    Footprint -> each strategy's `footprint`, in application order -> what one rank holds of it
    what it holds -> each strategy's `cost` -> messages

What the loop itself sums (loss, gradient norm, loads of experts) is a few numbers and does not
count. Nor does an axis of one rank: nothing travels. Bytes held between steps: parameters,
gradients and optimizer states, not buffers. Activations are counted by themselves, as the most that
is there at once within a step (`activations`).

The prediction is for a step after the first two, and exact, with three exceptions. Where routers
send tokens to other ranks, what all ranks along `ep` send is exact, one rank's bytes are as if
every expert had as many tokens; a capacity that drops tokens makes it less. Under autocast (mixed
precision without fsdp or replicate) what enters a layer counts in the format of the weights, what
leaves it in that of the products: too much for a layer between two layers, as in BERT's head. And
an optimizer is taken to keep the same states of every parameter, whatever its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from dtrain.parallel.footprint import Activation, Footprint
from dtrain.parallel.messages import Message

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan


@dataclass(frozen=True)
class Cost:
    """One rank's: messages of an optimizer step, and bytes held between steps (gradients: before
    the step).

    Of several updates' gradients, and of activations, the most that are there at once; None: not
    told, since autocast keeps some of them in one format and some in another.
    """

    messages: tuple[Message, ...]
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None


def fold(footprint: Footprint, plan: Plan, rank: int = 0) -> Cost:
    """What the plan costs a rank; needs no process group."""
    footprint = replace(footprint, place=coordinates(plan.degrees, rank))
    for strategy in plan.strategies:
        footprint = strategy.footprint(footprint, plan)
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for each in (m for strategy in plan.strategies for m in strategy.cost(footprint, plan)):
        if each.calls and plan.degrees[each.axis] > 1:
            calls, size = totals.get((each.axis, each.operation), (0, 0))
            totals[each.axis, each.operation] = calls + each.calls, size + each.bytes
    return Cost(
        tuple(Message(*key, *total) for key, total in sorted(totals.items())),
        *_held(footprint),
        activations(footprint) if plan.casts or not plan.precision.mixed else None,
    )


def _held(footprint: Footprint) -> tuple[int, int, int]:
    if footprint.held:
        return footprint.held
    held: Counter[str] = Counter()
    gradients: Counter[int] = Counter()
    for piece in footprint.pieces:
        sizes = {weight: prod(weight.held) for weight in piece.weights}
        held["elements"] += sum(sizes.values())
        trained = {
            weight: size
            for weight, size in sizes.items()
            if weight.ready is not None and weight.reached
        }
        gradients.update(dict.fromkeys(piece.reached, sum(trained.values())))
        stepped = [size for weight, size in trained.items() if weight.stepped]
        held["states"] += (
            sum(stepped) * footprint.state_bytes[0] + len(stepped) * footprint.state_bytes[1]
        )
    size = footprint.weight_bytes
    return held["elements"] * size, max(gradients.values(), default=0) * size, held["states"]


def activations(footprint: Footprint) -> int:
    """The most bytes of activations that a rank holds at once.

    In a pipeline those of every micro-batch that waits for its backward pass, and what computing a
    block's activations again adds to one of them.
    """
    pieces = footprint.pieces
    if not any(piece.flights for piece in pieces):
        return _peak(kept for piece in pieces for kept in piece.kept)
    waiting = []
    for piece in pieces:
        turn = min((kept.died for kept in piece.kept), default=0)
        waiting.append(sum(kept.bytes for kept in piece.kept if kept.born <= turn))
    again = max(_peak(piece.kept) - each for piece, each in zip(pieces, waiting, strict=True))
    curves = (
        [begun * each + done * piece.sent for begun, done in piece.flights]
        for piece, each in zip(pieces, waiting, strict=True)
    )
    return again + max(map(sum, zip(*curves, strict=True)))


def _peak(kept: Iterable[Activation]) -> int:
    return max(
        bytes_over_time((each.born, each.died, each.bytes) for each in kept).values(), default=0
    )


def bytes_over_time(lifetimes: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """The bytes that are there from each moment at which they change; of (born, died, bytes),
    both moments included.
    """
    change: Counter[int] = Counter()
    for born, died, size in lifetimes:
        change[born] += size
        change[died + 1] -= size
    moments = sorted(change)
    return dict(zip(moments, accumulate(change[moment] for moment in moments), strict=True))


def coordinates(degrees: Mapping[str, int], rank: int) -> dict[str, int]:
    """A rank's coordinate on each axis; the last axis changes fastest."""
    found = {}
    for axis, degree in reversed(list(degrees.items())):
        rank, found[axis] = divmod(rank, degree)
    return found
