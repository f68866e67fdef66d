"""Predict the cost of a plan for a rank from shapes alone: messages of a step, and memory.

    record_footprint(task, plan) -> Footprint: one micro-batch of every update, on the meta device
    Footprint -> each strategy's `footprint`, in application order -> the Footprint of one rank
    the Footprint of one rank -> each strategy's `cost` -> messages

What the loop itself sums (loss, gradient norm, loads of experts) is a few numbers and does not
count. Nor does an axis of one rank: nothing travels. Bytes between steps are parameters, gradients
and optimizer states, without buffers. Activations are counted apart, as the most bytes at one
moment of a step (`predicted_activations.py`).

An example: rank 0 of two trains `Linear(4, 6, bias=False)` in fp32 with Adam. The weight has 24
elements, so 96 bytes. Adam keeps two numbers an element and a step count of 4 bytes: 2 x 96 + 4 =
196 bytes. zero1 gives out whole weights, this one to rank 0; fsdp leaves half of each weight on a
rank: 48 bytes, and 2 x 48 + 4 = 100 of Adam's. The table has bytes, and calls x bytes of messages:

    strategy   parameters  gradients  optimizer  messages
    ddp                96         96        196  all_reduce 1 x 96
    zero1              96         96        196  all_reduce 1 x 96, broadcast 1 x 96
    fsdp               48         48        100  all_gather 2 x 96, reduce_scatter 1 x 96

The prediction is for a step after the first two. It is exact, with three exceptions:

* Where routers send tokens to other ranks, the bytes of all ranks along `ep` together are exact;
  one rank's are predicted as if every expert had equally many tokens. A capacity that drops tokens
  makes them fewer.
* Under autocast (mixed precision without fsdp or replicate) the input of a layer counts in the
  format of the weights, its output in that of the products. That is too much for a layer between
  two layers, as in BERT's head.
* An optimizer is taken to keep the same states for every parameter, whatever its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from dtrain.cost.predicted_activations import activations
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message

if TYPE_CHECKING:
    from dtrain.parallel.plan import Plan


@dataclass(frozen=True)
class Cost:
    """The cost of one optimizer step for one rank."""

    messages: tuple[Message, ...]
    parameter_bytes: int
    gradient_bytes: int  # before the step; the most at once, if there are several updates
    optimizer_bytes: int
    activation_bytes: int | None  # the most at once; None: autocast keeps them in two formats


def fold(footprint: Footprint, plan: Plan, rank: int = 0) -> Cost:
    """Return what the plan costs a rank. It needs no process group."""
    footprint = replace(footprint, place=coordinates(plan.degrees, rank))
    for strategy in plan.strategies:
        footprint = strategy.footprint(footprint, plan)
    totals: dict[tuple[str, str], tuple[int, int, int]] = {}
    for each in (m for strategy in plan.strategies for m in strategy.cost(footprint, plan)):
        if each.calls and plan.degrees[each.axis] > 1:
            calls, size, largest = totals.get((each.axis, each.operation), (0, 0, 0))
            totals[each.axis, each.operation] = (
                calls + each.calls,
                size + each.bytes,
                max(largest, each.largest),
            )
    return Cost(
        tuple(Message(*key, *total) for key, total in sorted(totals.items())),
        *_bytes_between_steps(footprint),
        activations(footprint) if plan.casts or not plan.precision.mixed else None,
    )


def _bytes_between_steps(footprint: Footprint) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and optimizer states."""
    if footprint.held:
        return footprint.held
    elements = states = 0
    gradients: Counter[int] = Counter()  # elements by update
    for piece in footprint.pieces:
        sizes = {weight: prod(weight.held) for weight in piece.weights}
        trained = {w: size for w, size in sizes.items() if w.ready is not None and w.reached}
        stepped = [size for weight, size in trained.items() if weight.stepped]
        elements += sum(sizes.values())
        gradients.update(dict.fromkeys(piece.reached, sum(trained.values())))
        states += sum(stepped) * footprint.state_bytes[0] + len(stepped) * footprint.state_bytes[1]
    size = footprint.weight_bytes
    return elements * size, max(gradients.values(), default=0) * size, states


def coordinates(degrees: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return a rank's coordinate on each axis; the last axis changes fastest."""
    on_axis = {}
    for axis, degree in reversed(list(degrees.items())):
        rank, on_axis[axis] = divmod(rank, degree)
    return on_axis
