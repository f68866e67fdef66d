"""What the ranks of a pipeline do in a step, in order, as torch's schedules say it; no process
group is needed.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _ComputationType

from dtrain.parallel.footprint import BACKWARD, FORWARD, FREE, GATHER, WEIGHTS

if TYPE_CHECKING:
    from dtrain.strategy.pipeline.strategy import PipelineParallel

PASSES = {
    _ComputationType.FORWARD: FORWARD, _ComputationType.FULL_BACKWARD: BACKWARD,
    _ComputationType.BACKWARD_INPUT: BACKWARD, _ComputationType.UNSHARD: GATHER,
    _ComputationType.RESHARD: FREE, _ComputationType.REDUCE_GRAD: FREE,
}  # fmt: skip
FINISHED = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT)
DURATIONS = {  # a backward pass has twice the products of a forward pass, half of them for weights
    _ComputationType.FORWARD: 1, _ComputationType.FULL_BACKWARD: 2,
    _ComputationType.BACKWARD_INPUT: 1, _ComputationType.BACKWARD_WEIGHT: 1,
}  # fmt: skip


def actions(pipeline: PipelineParallel, rank: int, micro_batches: int) -> list[Any]:
    """What one rank along `pp` does in a step."""
    stages = [stage for stage in range(pipeline.stages) if pipeline.owner(stage) == rank]
    of_all = {
        "num_stages": pipeline.stages,
        "group_size": pipeline.degree,
        "group_rank": rank,
        "submod": None,
    }
    told: Any = [SimpleNamespace(stage_index=stage, **of_all) for stage in stages]
    single = issubclass(pipeline.kind, PipelineScheduleSingle)
    schedule: Any = pipeline.kind(told[0] if single else told, micro_batches)
    order = schedule._get_pipeline_order() if single else schedule.pipeline_order_with_comms
    return [part for action in order[rank] if action for part in action.sub_actions or (action,)]


def passes_of_stages(
    pipeline: PipelineParallel, stages: list[int], rank: int, micro_batches: int
) -> dict[int, tuple[tuple[str, ...], tuple[tuple[int, int], ...]]]:
    """What happens to the weights of each of a rank's stages in a step, in the schedule's order; no
    process group.

    And, after each of the rank's actions, how many micro-batches have gone forward through the
    stage and not all the way back, and how many have.
    """
    found, everything = {}, actions(pipeline, rank, micro_batches)
    for stage in stages:
        own = [a.computation_type if a.stage_index == stage else None for a in everything]
        begun = accumulate(kind == _ComputationType.FORWARD for kind in own)
        done = accumulate(kind in FINISHED for kind in own)
        flights = tuple((b - d, int(d)) for b, d in zip(begun, done, strict=True))
        found[stage] = tuple(PASSES[kind] for kind in own if kind in PASSES), flights
    return found


def bubble(pipeline: PipelineParallel, micro_batches: int) -> float:
    """The idle share of the ranks' time, were every stage as costly, its backward twice its
    forward, and sending free.

    For gpipe and 1f1b that is (p-1)/(m+p-1), with v stages a rank and m a multiple of p (p-1)/(v
    m+p-1).
    """
    ranks = [_work(pipeline, rank, micro_batches) for rank in range(pipeline.degree)]
    ends: dict[tuple[str, int, int], int] = {}
    free, waiting = [0] * len(ranks), [list(reversed(todo)) for todo in ranks]
    while any(waiting):
        for rank, todo in enumerate(waiting):
            while todo and ends.keys() >= (needs := _needs(todo[-1][0], pipeline.stages - 1)):
                key, duration = todo.pop()
                free[rank] = ends[key] = (
                    max([free[rank], *(ends[need] for need in needs)]) + duration
                )
    return 1 - sum(duration for todo in ranks for _, duration in todo) / (
        pipeline.degree * max(free)
    )


def _work(
    pipeline: PipelineParallel, rank: int, micro_batches: int
) -> list[tuple[tuple[str, int, int], int]]:
    """What takes a rank time: (kind, stage, micro-batch), duration.

    Of each kind micro-batches come in order.
    """
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for action in actions(pipeline, rank, micro_batches):
        if duration := DURATIONS.get(action.computation_type):
            kind, stage = PASSES.get(action.computation_type, WEIGHTS), action.stage_index
            # torch's own numbers of 1f1b are shifted
            found.append(((kind, stage, seen[kind, stage]), duration))
            seen[kind, stage] += 1
    return found


def _needs(key: tuple[str, int, int], last: int) -> set[tuple[str, int, int]]:
    """What must be done before: the neighbour's part of the same pass, and the stage's own part
    before.
    """
    kind, stage, micro_batch = key
    if kind == FORWARD:
        return {(FORWARD, stage - 1, micro_batch)} if stage else set()
    if kind == WEIGHTS:
        return {(BACKWARD, stage, micro_batch)}
    return {(FORWARD, stage, micro_batch)} | (
        {(BACKWARD, stage + 1, micro_batch)} if stage < last else set()
    )
