"""What a plan costs the ranks of a whole world, from the prediction for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from dtrain.cost.predict import Cost, fold
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.plan import Plan

EVERY_RANK = 64  # ranks; of a larger world, those at the ends of each axis in every stage


@dataclass(frozen=True)
class PlanCost:
    """The cost of the rank that holds most, and the bytes that the busiest one sends.

    Args:
        rows: of the global batch.
        micro_batches: into which each rank divides its rows.
        rank: the one that holds most; the lowest of several.
        sent: bytes of a step that leave the rank that sends most, in a ring, by axis.
    """

    plan: Plan
    rows: int
    micro_batches: int
    rank: int
    cost: Cost
    sent: dict[str, float]

    @property
    def rows_at_once(self) -> int:
        """Return the rows of one micro-batch of a rank."""
        return self.rows // (self.plan.row_parts * self.micro_batches)

    @property
    def buffers(self) -> int:
        """Return the bytes of the largest message of each operation on each axis, together."""
        return sum(message.largest for message in self.cost.messages)

    @property
    def total(self) -> int:
        """Return the bytes of all that is predicted. Unknown activations count 0."""
        return _held(self.cost) + self.buffers


def plan_cost(footprint: Footprint, plan: Plan, rows: int) -> PlanCost:
    """Fold a footprint for the ranks of the plan. It needs no process group.

    Args:
        rows: of the global batch.
    """
    costs = {rank: fold(footprint, plan, rank) for rank in _ranks(plan.degrees)}
    sent = {rank: _wire_bytes(cost, plan) for rank, cost in costs.items()}
    fullest = max(costs, key=lambda rank: (_held(costs[rank]), -rank))
    busiest = max(sent, key=lambda rank: (sum(sent[rank].values()), -rank))
    return PlanCost(plan, rows, footprint.micro_batches, fullest, costs[fullest], sent[busiest])


def _held(cost: Cost) -> int:
    return (
        cost.parameter_bytes
        + cost.gradient_bytes
        + cost.optimizer_bytes
        + (cost.activation_bytes or 0)
    )


def _wire_bytes(cost: Cost, plan: Plan) -> dict[str, float]:
    sent = {axis: 0.0 for axis, degree in plan.degrees.items() if degree > 1}
    for message in cost.messages:
        sent[message.axis] += message.wire_bytes(plan.degrees[message.axis])
    return sent


def _ranks(degrees: Mapping[str, int]) -> list[int]:
    """Return the ranks to look at: all of a small world."""
    sizes = tuple(degrees.values())
    places = product(
        *(
            range(degree) if prod(sizes) <= EVERY_RANK or axis == "pp" else sorted({0, degree - 1})
            for axis, degree in degrees.items()
        )
    )
    return [
        sum(index * prod(sizes[at + 1 :]) for at, index in enumerate(place)) for place in places
    ]
