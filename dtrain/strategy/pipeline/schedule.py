"""What the ranks of a pipeline do in a step, in order, as torch's schedules say.

    Schedule("interleaved_1f1b", degree=2, stages_per_rank=2)    rank 0: stages 0, 2   rank 1: 1, 3
    Schedule("zbv", degree=2, stages_per_rank=2)                 rank 0: stages 0, 3   rank 1: 1, 2

A schedule is a value: it needs no model, no plan and no process group.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _ComputationType

from dtrain.parallel.footprint import BACKWARD, FORWARD, FREE, GATHER, WEIGHTS

SCHEDULES: dict[str, type[Any]] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "looped_bfs": schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
ONE_STAGE = ("gpipe", "1f1b")  # a rank holds one stage
V_SHAPED = ("zbv", "dualpipev")  # a rank holds two, one on the way down and one on the way up
# micro-batches go round in equal groups of about as many as there are ranks
ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")
# input gradients first, those of weights later
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")

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

Work = tuple[str, int, int]  # FORWARD, BACKWARD or WEIGHTS; stage; micro-batch


@dataclass(frozen=True)
class Schedule:
    """Which stages each rank along `pp` holds, and in which order they run micro-batches.

    Args:
        kind: a name of SCHEDULES.
        degree: ranks along `pp`.
        stages_per_rank: stages that each of them holds.
    """

    kind: str
    degree: int
    stages_per_rank: int

    @property
    def stages(self) -> int:
        """Stages of all ranks."""
        return self.degree * self.stages_per_rank

    def owner(self, stage: int) -> int:
        """Return the rank along `pp` that holds a stage."""
        if self.kind in V_SHAPED and stage >= self.degree:
            return 2 * self.degree - 1 - stage
        return stage % self.degree

    def held_by(self, rank: int) -> list[int]:
        """Return the stages that a rank along `pp` holds, in order."""
        return [stage for stage in range(self.stages) if self.owner(stage) == rank]

    @property
    def least_micro_batches(self) -> int:
        """The fewest micro-batches that torch's schedule takes."""
        return {"1f1b": self.degree, "dualpipev": self.stages}.get(self.kind, 1)

    def micro_batches(self, rows: int) -> list[int]:
        """Return the numbers of micro-batches that this schedule takes for a rank's `rows`."""
        return [
            number
            for number in range(self.least_micro_batches, rows + 1)
            if rows % number == 0
            and (self.kind not in ROUNDS or number % max(1, number // self.degree) == 0)
        ]

    def build(self, stages: list[Any], micro_batches: int, **options: Any) -> Any:
        """Return torch's schedule over the stages that a rank holds."""
        kind = SCHEDULES[self.kind]
        single = issubclass(kind, PipelineScheduleSingle)
        return kind(stages[0] if single else stages, micro_batches, **options)


def actions(schedule: Schedule, rank: int, micro_batches: int) -> list[Any]:
    """Return what one rank along `pp` does in a step, as torch's actions."""
    of_all = {
        "num_stages": schedule.stages,
        "group_size": schedule.degree,
        "group_rank": rank,
        "submod": None,
    }
    stages = [SimpleNamespace(stage_index=stage, **of_all) for stage in schedule.held_by(rank)]
    built = schedule.build(stages, micro_batches)
    single = isinstance(built, PipelineScheduleSingle)
    order = built._get_pipeline_order() if single else built.pipeline_order_with_comms
    return [part for action in order[rank] if action for part in action.sub_actions or (action,)]


def passes_of_stages(
    schedule: Schedule, rank: int, micro_batches: int
) -> dict[int, tuple[tuple[str, ...], tuple[tuple[int, int], ...]]]:
    """Return (passes, flights) of each stage of a rank, by the stage's number.

    Returns:
        passes: what a step does with the stage's weights, in order.
        flights: (under way, done) after each of the rank's actions: micro-batches that have gone
            forward and not all the way back, and those that have.
    """
    everything = actions(schedule, rank, micro_batches)
    passes = {}
    for stage in schedule.held_by(rank):
        own = [a.computation_type if a.stage_index == stage else None for a in everything]
        begun = accumulate(kind == _ComputationType.FORWARD for kind in own)
        done = accumulate(kind in FINISHED for kind in own)
        flights = tuple((b - d, int(d)) for b, d in zip(begun, done, strict=True))
        passes[stage] = tuple(PASSES[kind] for kind in own if kind in PASSES), flights
    return passes


def bubble(schedule: Schedule, micro_batches: int) -> float:
    """Return the share of a step in which ranks are idle, if sending takes no time.

    All stages cost the same, and a backward pass twice a forward pass. For gpipe and 1f1b that is
    (p-1)/(m+p-1) for p ranks and m micro-batches; with v stages a rank, and m a multiple of p,
    (p-1)/(v m+p-1).
    """
    times = timetable(schedule, micro_batches).values()
    busy = sum(end - begin for begin, end in times)
    return 1 - busy / (schedule.degree * max(end for _, end in times))


def timetable(schedule: Schedule, micro_batches: int) -> dict[Work, tuple[int, int]]:
    """Return when each piece of a step's work begins and ends, in forward passes of a stage."""
    waiting = [_work(schedule, rank, micro_batches)[::-1] for rank in range(schedule.degree)]
    times: dict[Work, tuple[int, int]] = {}
    free = [0] * len(waiting)
    while any(waiting):
        for rank, todo in enumerate(waiting):
            while todo and times.keys() >= (needs := _needs(todo[-1][0], schedule.stages - 1)):
                work, duration = todo.pop()
                begin = max([free[rank], *(times[need][1] for need in needs)])
                free[rank] = begin + duration
                times[work] = begin, free[rank]
    return times


def _work(schedule: Schedule, rank: int, micro_batches: int) -> list[tuple[Work, int]]:
    """Return what takes a rank time, in order, and how long it takes."""
    seen: Counter[tuple[str, int]] = Counter()
    work = []
    for action in actions(schedule, rank, micro_batches):
        if duration := DURATIONS.get(action.computation_type):
            kind, stage = PASSES.get(action.computation_type, WEIGHTS), action.stage_index
            # counted, since torch's own numbers of 1f1b are shifted: each kind comes in order
            work.append(((kind, stage, seen[kind, stage]), duration))
            seen[kind, stage] += 1
    return work


def _needs(work: Work, last: int) -> set[Work]:
    """Return what must be done before: by the stage itself, and by its neighbour."""
    kind, stage, micro_batch = work
    if kind == FORWARD:
        return {(FORWARD, stage - 1, micro_batch)} if stage else set()
    if kind == WEIGHTS:
        return {(BACKWARD, stage, micro_batch)}
    return {(FORWARD, stage, micro_batch)} | (
        {(BACKWARD, stage + 1, micro_batch)} if stage < last else set()
    )
