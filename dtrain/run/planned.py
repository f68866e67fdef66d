"""Predict what a plan costs on any number of ranks. No rank is started, no weight is allocated.

The prediction is that of `profile=true`, which a run holds against what it measures.
"""

from __future__ import annotations

from dataclasses import replace

from dtrain.config.schema import Config
from dtrain.cost.plan_cost import PlanCost, plan_cost
from dtrain.launch.world import World
from dtrain.parallel.plan import Plan
from dtrain.run.assemble import assemble, footprint_of, plan_of


def predicted_cost(config: Config, world_size: int) -> PlanCost:
    """Predict the cost of a configuration's plan.

    With `global_batch_size=0` the batch has as few rows as the plan divides.

    Raises:
        ValueError: a mistake in the configuration, or shapes alone cannot tell the cost.
    """
    world = World(0, world_size, 0, 1)
    plan = plan_of(config, world)
    if asynchronous := next((s for s in plan.strategies if s.asynchronous), None):
        raise ValueError(
            f"nothing is predicted of strategy {asynchronous.name}, whose ranks do not meet in "
            "every step: use another one"
        )
    rows = config.global_batch_size or _fewest_rows(plan, config.micro_batch_size)
    config = replace(config, global_batch_size=rows, probe=False, profile=False, logger={})
    job = assemble(config, world)
    return plan_cost(footprint_of(job), job.plan, rows)


def _fewest_rows(plan: Plan, micro_batch_size: int | None) -> int:
    """Return the smallest global batch that the plan divides evenly.

    Raises:
        ValueError: there is none.
    """
    unit, refusal = plan.row_parts * (micro_batch_size or 1), ValueError()
    for factor in range(1, 4 * plan.world_size + 1):  # a pipeline wants a few rows for each stage
        try:
            plan.micro_batches(unit * factor, micro_batch_size)
        except ValueError as error:
            refusal = error
        else:
            return unit * factor
    raise refusal
