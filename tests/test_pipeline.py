"""Where a pipeline cuts a model, and into how many micro-batches it divides a rank's rows."""

from __future__ import annotations

from itertools import accumulate

import pytest
from cases import NextToken

from dtrain.parallel.plan import Plan
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.task.batch import pieces

LAYERS = 7


def held(split: list[int], schedule: str, size: int) -> list[list[str]]:
    """The blocks of each piece on this rank."""
    make = NextToken(n_layers=LAYERS).models["model"]
    plan = Plan.of([PipelineParallel(size, schedule=schedule, split=split)], size).connect()
    parts = pieces(plan.parallelize(make, 0))
    return [list(dict(part.get_submodule("blocks").named_children())) for part in parts]


@pytest.mark.parametrize(("split", "schedule", "stages_of_ranks"), [
    ([6, 1], "1f1b", ([0], [1])),
    ([1, 6], "gpipe", ([0], [1])),
    ([1, 3, 2, 1], "interleaved_1f1b", ([0, 2], [1, 3])),
    ([4, 1, 1, 1], "zbv", ([0, 3], [1, 2])),
])  # fmt: skip
def test_each_stage_has_the_blocks_that_the_split_gives_it(
    split: list[int], schedule: str, stages_of_ranks: tuple[list[int], list[int]], world
) -> None:
    """In order, by their names in the whole model."""
    ends = list(accumulate(split))
    stages = [list(map(str, range(end - n, end))) for n, end in zip(split, ends, strict=True)]
    expected = [[stages[stage] for stage in own] for own in stages_of_ranks]
    assert world(2).run(held, split, schedule, 2) == expected


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "looped_bfs"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_by_itself_it_is_idle_for_less_than_a_third_of_a_step(ranks: int, schedule: str) -> None:
    """The fewest micro-batches, of two a rank or more, that divide the rows; or else a row each."""
    pipeline = PipelineParallel(ranks, schedule=schedule)
    for rows in range(ranks, 41):
        found = pipeline.micro_batches(rows, None)
        enough = [number for number in range(2 * ranks, rows + 1) if rows % number == 0]
        assert found == min(enough, default=rows)
        if enough:
            bubble = (ranks - 1) / (found + ranks - 1)  # of one stage a rank; it falls with more
            assert bubble < 1 / 3


def test_what_is_asked_for_decides_the_micro_batches() -> None:
    """Their number, or how many rows they have."""
    for number in (2, 3, 6, 12):
        assert PipelineParallel(2, micro_batches=number).micro_batches(12, None) == number
        assert PipelineParallel(2).micro_batches(12, 12 // number) == number
