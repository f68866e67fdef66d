"""Which plans there are, and what the others are told."""

from __future__ import annotations

from math import prod

import pytest
import torch
from cases import STRATEGIES, Case, refusal, trainer
from hypothesis import given
from hypothesis import strategies as st

from dtrain.model.transformer import Transformer
from dtrain.parallel.mesh import fill_degrees
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.strategy.ddp import DDP
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor.layers import refuse_lost_rows


@given(
    st.dictionaries(
        st.sampled_from(["pp", "dp", "fsdp", "tp"]), st.sampled_from([-1, 1, 2, 3, 4]), min_size=1
    ),
    st.integers(1, 48),
)
def test_degrees_fill_the_world_or_are_refused(degrees: dict[str, int], world: int) -> None:
    try:
        filled = fill_degrees(degrees, world)
    except ValueError as error:
        assert str(world) in str(error) and "\n" not in str(error)
        return
    assert prod(filled.values()) == world
    assert all(filled[axis] == degree for axis, degree in degrees.items() if degree != -1)


@pytest.mark.parametrize(
    ("degrees", "world", "expected"),
    [
        ({"dp": -1, "fsdp": -1}, 4, {"dp": 2, "fsdp": 2}),
        ({"dp": -1, "fsdp": -1}, 8, {"dp": 2, "fsdp": 4}),
        ({"dp": 2, "fsdp": -1}, 8, {"dp": 2, "fsdp": 4}),
        ({"dp": -1}, 1, {"dp": 1}),
        ({}, 1, {}),
    ],
)
def test_the_rest_of_the_world_is_shared_out(
    degrees: dict[str, int], world: int, expected: dict[str, int]
) -> None:
    assert fill_degrees(degrees, world) == expected


@pytest.mark.parametrize(
    ("strategies", "world", "message"),
    [
        ([], 2, r"strategy single uses 1 rank, the job has 2 \(choose a strategy: ddp, fsdp"),
        ([DDP(3)], 4, "strategy dp=3 uses 3 ranks, the job has 4"),
        (
            [Replicate(2), FSDP()],
            5,
            "strategy dp=2 x fsdp=rest uses a multiple of 2 ranks, the job has 5",
        ),
        (
            [Replicate(), FSDP()],
            2,
            "needs at least 2 ranks on each of dp and fsdp: 4 or more in all, the job has 2",
        ),
        (
            [DDP(2), FSDP(2)],
            4,
            "ddp stands alone: beside fsdp it would train wrong weights; use replicate",
        ),
        ([DDP(), Replicate()], 4, "DDP and Replicate both want the axis dp"),
        ([FSDP(0)], 4, r"strategy.fsdp.degree=0 must be at least 1, or -1"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(
    strategies: list[Strategy], world: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(strategies, world)


def test_rows_that_do_not_come_out_even_are_refused() -> None:
    plan = Plan.of([DDP()], 4)
    assert plan.micro_batches(16, None) == 1 and plan.micro_batches(16, 2) == 2
    with pytest.raises(
        ValueError,
        match="global_batch_size=10 is not divisible by 4 data-parallel ranks x "
        "micro_batch_size=2: use global_batch_size=8 or 16",
    ):
        plan.micro_batches(10, 2)
    with pytest.raises(
        ValueError,
        match=(
            "global_batch_size=7 is not divisible by 4 data-parallel ranks: use "
            "global_batch_size=4 or 8"
        ),
    ):
        plan.micro_batches(7, None)


@given(st.integers(1, 64), st.integers(1, 5), st.integers(1, 9) | st.none())
def test_micro_batches_have_as_many_rows_as_are_asked_for_or_are_refused(
    rows: int, ranks: int, each: int | None
) -> None:
    plan = Plan.of([DDP(ranks)], ranks)
    if rows % (ranks * (each or 1)):
        with pytest.raises(
            ValueError,
            match=f"global_batch_size={rows} is not divisible by {ranks} data-parallel ranks",
        ):
            plan.micro_batches(rows, each)
    else:
        assert plan.micro_batches(rows, each) * ranks * (each or rows // ranks) == rows


def test_strategies_are_ordered_whatever_the_user_writes() -> None:
    plan = Plan.of([Replicate(2), FSDP(2)], 4)
    assert [s.axis for s in plan.strategies] == ["fsdp", "dp"]
    assert plan.degrees == {"dp": 2, "fsdp": 2} and list(plan.degrees) == ["dp", "fsdp"]


def _verified(strategy: str, size: int) -> dict[str, tuple[int, ...]]:
    made = trainer(Case("next_token", strategy, steps=1), size)
    return {
        n: tuple(getattr(p, "to_local", lambda p=p: p)().shape)
        for n, p in made.models["model"].named_parameters()
    }


def test_fsdp_holds_a_slice_and_ddp_the_whole(world) -> None:
    name = "head.norm.weight"
    assert [shapes[name] for shapes in world(4).run(_verified, "fsdp", 4)] == [(6,)] * 4
    assert [shapes[name] for shapes in world(4).run(_verified, "hsdp", 4)] == [(12,)] * 4
    assert [shapes[f"module.{name}"] for shapes in world(4).run(_verified, "ddp", 4)] == [(24,)] * 4
    assert [s["embedding.token.weight"][0] for s in world(4).run(_verified, "fsdp", 4)] == [
        16,
        16,
        16,
        13,
    ]


def _quietly_not_sharded(size: int) -> str:
    class Quiet(FSDP):
        def parallelize(self, model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
            return model

    STRATEGIES["quiet"] = [Quiet]
    try:
        trainer(Case("next_token", "quiet", steps=1), size)
    except AssertionError as error:
        return str(error)
    finally:
        del STRATEGIES["quiet"]
    return ""


def test_a_strategy_that_quietly_does_nothing_is_found(world) -> None:
    assert all("is not sharded over fsdp" in said for said in world(2).run(_quietly_not_sharded, 2))


def _poisoned(strategy: str, size: int) -> tuple[str, bool]:
    """Rank 1's rows give an infinite loss at step 3; what is said, and are the weights still
    finite?
    """
    from dtrain.train import NonFinite

    made = trainer(Case("gan", strategy, steps=5), size)
    batch = made.task.batch
    rows = len(batch(0)["real"]) // size

    def poisoned(step: int):
        made_batch = batch(step)
        if step == 2:
            made_batch["real"][rows : 2 * rows] = float("inf")
        return made_batch

    made.task.batch = poisoned  # type: ignore[method-assign]
    said = ""
    try:
        for _ in made.steps():
            pass
    except NonFinite as error:
        said = str(error)
    return said, all(bool(t.isfinite().all()) for t in made.state().values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_names_step_rank_and_batch(strategy: str, world) -> None:
    for said, finite in world(2).run(_poisoned, strategy, 2):
        assert said.startswith("step 3: loss") and "on rank 1; batch 2 of seed 0" in said
        assert finite


def _with_batch_norm(size: int) -> str:
    plan = Plan.of([DDP()], size).connect()
    try:
        plan.parallelize(
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), 0
        )
    except ValueError as error:
        return str(error)
    return ""


def test_batch_norm_over_several_parts_is_refused(world) -> None:
    assert all(
        "batch norm, whose statistics would be those of one rank's part" in s
        for s in world(2).run(_with_batch_norm, 2)
    )


def test_buffers_are_part_of_the_state(alone) -> None:
    made = trainer(Case("gan", "single", steps=1), 1)
    made.models["generator"].register_buffer("kept", torch.ones(2))
    made.models["generator"].register_buffer("passing", torch.ones(2), persistent=False)
    assert "generator.kept" in made.state() and "generator.passing" not in made.state()


@given(st.integers(1, 400), st.integers(2, 4), st.integers(1, 8))
def test_torch_finds_rows_that_tp_divides(parts: int, tp: int, fsdp: int) -> None:
    """So only sizes that tp does not divide can be refused; and two sharded ranks never lose
    count.
    """
    with torch.device("meta"):
        divided, any_size = (Transformer(rows, 4, 4 * tp, 1, tp) for rows in (parts * tp, parts))
    refuse_lost_rows(divided, tp, fsdp)
    refuse_lost_rows(any_size, tp, 2)


def test_rows_that_torch_would_lose_are_refused() -> None:
    """GPT-2's 50,257 words on two by four ranks: some would be given rows of others, and the
    rest wait for them.
    """
    said = (
        "torch loses count of the 61 rows of embedding.token.weight, cut by tp=2 and then by "
        "fsdp=3: use 60 or 62 rows"
    )
    assert said in refusal(Case("next_token", "fsdp_tensor"), 6) and not refusal(
        Case("next_token", "fsdp_tensor"), 4
    )
    with torch.device("meta"):
        model = Transformer(50257, 4, 8, 1, 2)
    with pytest.raises(ValueError, match="50257 rows .* use 50256 or 50258 rows"):
        refuse_lost_rows(model, 2, 4)
