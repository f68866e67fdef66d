"""Equal or refused, nothing else: every plan gives the losses, norms, gradients and weights of
one process.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from math import prod
from random import Random
from typing import Any

import pytest
from cases import (
    AXES,
    MOE,
    ROWS,
    STRATEGIES,
    TASKS,
    TOLERANCE,
    VARIANTS,
    Case,
    assert_all_equal,
    assert_equal,
    draw,
    reference,
    refusal,
    train,
    train_drawn,
    train_or_refuse,
)
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from worlds import World

from dtrain.run.assemble import COMPILERS
from dtrain.strategy.pipeline.schedule import SCHEDULES

FEW, FEWER, PAIR_STEPS, DRAWN_STEPS = 8, 3, 2, 3
DRAWN = 6  # models in a test
DEEP = (("n_layers", 4),)  # enough blocks for two stages on each of two ranks
COMPOSED_8 = ("hsdp_tensor", "3d", "4d", "pipeline_hsdp", "zero1_zbv_sequence")
WITHIN_4D = ("hsdp_tensor", "3d", "pipeline_hsdp")  # what else they do is done on four ranks too


def model_of(strategy: str) -> tuple[tuple[str, Any], ...]:
    parts = strategy.split("+")
    deep = (
        DEEP if any(p in SCHEDULES or p in ("split", "zero1_zbv_sequence") for p in parts) else ()
    )
    return deep + (MOE if any(p in ("expert", "moe_fsdp") for p in parts) else ())


def thorough() -> list[tuple[Case, int]]:
    """Long runs of every strategy with each option alone."""
    found = []
    for strategy in STRATEGIES.keys() - {"single", *COMPOSED_8}:
        model = model_of(strategy)
        found += [(Case("next_token", strategy, model=model), 4 if strategy != "split" else 2)]
        if strategy not in SCHEDULES and strategy not in ("split",):
            found += [(Case("gan", strategy), 4)]
        if strategy in ("fsdp_reduce_each", "hsdp_reduce_each"):
            found += [(Case("masked_token", strategy, micro_batch_size=1), 4)]
        if strategy in VARIANTS and strategy not in SCHEDULES:  # a schedule is tried in full
            continue
        found += [
            (
                Case(
                    "next_token",
                    strategy,
                    dtype="fp32",
                    steps=20 if strategy in AXES else FEW,
                    model=model,
                ),
                4,
            )
        ]
        found += [
            (
                Case(
                    "next_token", strategy, recompute=True, clip_norm=None, steps=FEW, model=model
                ),
                4,
            )
        ]
        rows = 3 if "tensor" in strategy else 1
        found += [
            (Case("masked_token", strategy, micro_batch_size=rows, steps=FEW, model=model), 4)
        ]
        for size in (2, 3):
            found += [(Case("masked_token", strategy, steps=FEW, model=model), size)]
    found += [
        (Case("gan", s, micro_batch_size=1, steps=FEW), 4)
        for s in ("ddp", "fsdp", "replicate", "zero1", "tensor")
    ]
    found += [
        (Case("next_token", strategy, steps=FEWER, model=model_of(strategy)), 8)
        for strategy in COMPOSED_8
    ]
    return sorted((c for c in found if not refusal(*c)), key=lambda pair: (pair[1], str(pair[0])))


def quick() -> list[tuple[Case, int]]:
    """Short runs, two of each axis' strategies, in which each pair of two options' values comes
    (see the test below).
    """
    found = []
    for strategy in sorted(NAMES):
        either = Random(strategy)
        rows = 3 if "tensor" in strategy else 1
        sizes, dtypes, micro, recompute, clip = (
            either.sample(values, len(values))
            for values in (
                [8] if strategy in COMPOSED_8 else [2, 3, 4],
                ["fp64", "fp32"],
                [rows, None],
                [True, False],
                [0.3, None],
            )
        )
        gan = not refusal(Case("gan", strategy), sizes[0])
        tasks = ["masked_token", "gan" if gan else "next_token"]
        for turn, task in enumerate(tasks if strategy in AXES else [either.choice(tasks)]):
            options = {
                "dtype": dtypes[turn],
                "recompute": recompute[turn] and task != "gan",
                "clip_norm": clip[turn],
                "steps": FEWER - (sizes[0] == 8),
                "model": () if task == "gan" else model_of(strategy),
            }
            if (
                model_of(strategy)
                and "n_experts" in dict(model_of(strategy))
                and task == "next_token"
            ):
                # their queries' first gradients are so small that fp32 rounds by more
                options["dtype"] = "fp64"
            order = sizes[turn:] + sizes[:turn]
            tried = [
                (Case(task, strategy, micro_batch_size=m, **options), n)
                for m in (micro[turn], None)
                for n in order
            ]
            found.append(next(each for each in tried if not refusal(*each)))
    return found


NAMES = frozenset(STRATEGIES) - {"single", *WITHIN_4D}
QUICK = quick()


def values(case: Case, size: int) -> dict[str, Any]:
    return {
        "strategy": case.strategy,
        "task": case.task,
        "dtype": case.dtype,
        "micro": case.micro_batch_size is not None,
        "recompute": case.recompute,
        "clips": case.clip_norm is not None,
        "size": size,
    }


def test_every_pair_of_values_is_tried() -> None:
    """Of two options, but where a strategy decides the other one; each strategy on two tasks,
    where it takes two.
    """
    pairs = {pair for each in QUICK for pair in combinations(values(*each).items(), 2)}
    known = [values(*each) for each in QUICK]
    for one, other in combinations(["task", "dtype", "micro", "recompute", "clips", "size"], 2):
        for a, b in product({v[one] for v in known}, {v[other] for v in known}):
            # a GAN has no blocks to recompute
            if {(one, a), (other, b)} & {("task", "gan"), ("size", 8)}:
                continue
            assert ((one, a), (other, b)) in pairs, (one, a, other, b)
    for strategy in AXES:
        own = [v for v in known if v["strategy"] == strategy]
        assert len({v["task"] for v in own}) >= 2 and len({v["clips"] for v in own}) == 2, strategy
    assert {v["strategy"] for v in known} == NAMES
    assert {v["size"] for v in known} == {2, 3, 4, 8}


@pytest.mark.parametrize(("case", "size"), QUICK, ids=str)
def test_plan_equals_one_process(case: Case, size: int, world, alone) -> None:
    assert_all_equal(world(size).run(train, case, size), reference(case), TOLERANCE[case.dtype])


@pytest.mark.deep
@pytest.mark.parametrize(("case", "size"), thorough(), ids=str)
def test_plan_equals_one_process_for_long(case: Case, size: int, world, alone) -> None:
    assert_all_equal(world(size).run(train, case, size), reference(case), TOLERANCE[case.dtype])


PAIRS = ["+".join(pair) for pair in combinations(AXES, 2)]
# beside another of their axis
ALIKE = {"replicate", "allreduce", "zero2", "tensor_sequence", "zbv", "ulysses"}


# tried above, by a name of their own
NAMED = {"fsdp+tensor", "fsdp+ring", "fsdp+1f1b", "tensor+1f1b", "fsdp+expert"}


def pairs() -> list[Any]:
    """Masked tokens, which differ from the next ones in their counts alone, for one strategy of
    a kind; and all.
    """
    quick = [pair for pair in PAIRS if pair not in NAMED and not ALIKE & set(pair.split("+"))]
    return [
        pytest.param(
            pair, task, marks=[] if task == "masked_token" and pair in quick else pytest.mark.deep
        )
        for pair in PAIRS
        for task in TASKS
    ]


@pytest.mark.parametrize(("pair", "task"), pairs())
def test_every_pair_is_equal_or_refused(pair: str, task: str, world, alone) -> None:
    """Two ranks on each of two axes; what is refused is refused with the reason, before any
    process group.
    """
    one, other = (AXES[name].func.axis for name in pair.split("+"))
    case = Case(task, pair, steps=PAIR_STEPS, model=() if task == "gan" else model_of(pair))
    if reason := refusal(case, 4):
        assert "\n" not in reason
        assert one != other or "both want the axis" in reason
        return
    assert one != other
    ranks = world(4).run(train_or_refuse, case, 4)
    assert not [r for r in ranks if isinstance(r, str)], f"{pair} is refused too late: {ranks}"
    assert_all_equal(ranks, reference(case), TOLERANCE["fp64"])


@pytest.mark.parametrize("task", TASKS)
def test_most_pairs_are_not_refused(task: str) -> None:
    model = {pair: () if task == "gan" else model_of(pair) for pair in PAIRS}
    equal = [pair for pair in PAIRS if not refusal(Case(task, pair, model=model[pair]), 4)]
    assert len(equal) >= {"next_token": 47, "masked_token": 47, "gan": 9}[task], len(equal)


@st.composite
def models(draw: st.DrawFn, names: list[str], mesh: dict[str, int]) -> dict[str, Any]:
    """A small Transformer that most often, but not always, fits the mesh."""
    fits = draw(st.integers(0, 9)) > 0
    heads = draw(st.sampled_from([12] if fits and mesh.keys() & {"tp", "cp"} else [2, 3, 4, 6, 12]))
    stages = mesh.get("pp", 1) * (1 if {"1f1b", "gpipe"} & set(names) else 2 if "pp" in mesh else 1)
    experts = (
        draw(st.sampled_from([0, 0, 2, 4]))
        if "ep" not in mesh
        else mesh["ep"] * draw(st.integers(1, 2))
    )
    rows_only = fits and "cp" in mesh  # rules of whole rows are refused there
    return {
        "d_model": heads * draw(st.sampled_from([2, 4])),
        "n_layers": draw(st.integers(stages if fits else 1, max(stages, 3) + 1)),
        "n_heads": heads,
        "n_kv_heads": draw(
            st.sampled_from([None, heads // mesh.get("tp", 1) * mesh.get("tp", 1) if fits else 1])
        ),
        "d_ff": draw(st.sampled_from([24, 36])),
        "tied": draw(st.booleans()),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "norm_first": draw(st.booleans()),
        "position": draw(st.sampled_from(["learned", "rotary"])),
        "activation": draw(st.sampled_from(["gelu", "swiglu"])),
        "bias": draw(st.booleans()),
        "n_experts": experts,
        "balance": draw(
            st.sampled_from(["none", "bias"] if rows_only else ["none", "loss", "bias"])
        ),
        "capacity_factor": draw(st.sampled_from([None] if rows_only else [None, None, 1.0])),
    }


ONE_OF_AN_AXIS = {
    "pp": [
        "1f1b",
        "gpipe",
        "zbv",
        "interleaved_1f1b",
        "looped_bfs",
        "interleaved_zero_bubble",
        "dualpipev",
    ],
    "dp": ["ddp", "replicate", "allreduce", "zero1"],
    "fsdp": ["fsdp", "zero2"],
    "cp": ["ring", "ulysses", "ring_unbalanced"],
    "ep": ["expert"],
    "tp": ["tensor", "tensor_sequence", "tensor_gathered"],
}
MESHES = [  # every way to lay at most eight ranks along one to three axes
    dict(zip(axes, degrees, strict=True))
    for several in (1, 2, 3)
    for axes in combinations(sorted(ONE_OF_AN_AXIS), several)
    for degrees in product((2, 3, 4), repeat=several)
    if prod(degrees) <= 8
    and ROWS % prod(d for a, d in zip(axes, degrees, strict=True) if a in ("dp", "fsdp", "ep")) == 0
]


def _drawn_models_equal_one_process(
    mesh: dict[str, int], data: st.DataObject, world: Callable[[int], World]
) -> None:
    makers = {
        data.draw(st.sampled_from(ONE_OF_AN_AXIS[axis])): degree for axis, degree in mesh.items()
    }
    model = data.draw(models(list(makers), mesh))
    case = Case(
        data.draw(st.sampled_from(["next_token", "masked_token"])),
        "drawn",
        steps=DRAWN_STEPS,
        micro_batch_size=data.draw(st.sampled_from([None, 1, 2])),
        recompute=data.draw(st.booleans()),
        model=tuple(model.items()),
    )
    size = prod(mesh.values())
    draw(makers)
    if reason := refusal(case, size):
        event(f"refused: {re.sub(r'[^a-z ]+', '*', reason)[:50]}")
        assert "\n" not in reason
        return
    event(f"equal on {size} ranks")
    expected, ranks = reference(case), world(size).run(train_drawn, case, makers, size)
    for outcome in (expected, *ranks):
        # a key's bias has no gradient but rounding, of which Adam makes a step: see gradients
        outcome.weights = {}
    floor = TOLERANCE["fp64"] * expected.norms[0]
    for outcome in ranks:
        for name in [n for n in outcome.gradients if expected.gradients[n].norm() < floor]:
            assert outcome.gradients.pop(name).norm() < 10 * floor
        assert_equal(outcome, expected, TOLERANCE["fp64"])


@pytest.mark.deep
@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", range(24))
def test_drawn_models_on_drawn_meshes_equal_one_process(number: int, world, alone) -> None:
    """Others in each of the numbered tests, the same ones each time."""

    @seed(number)
    @settings(suppress_health_check=list(HealthCheck), database=None, max_examples=DRAWN)
    @given(mesh=st.sampled_from(MESHES), data=st.data())
    def drawn(mesh: dict[str, int], data: st.DataObject) -> None:
        _drawn_models_equal_one_process(mesh, data, world)

    drawn()


@pytest.mark.deep
@pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler: none here"
)
@pytest.mark.parametrize("strategy", ["fsdp", "ddp", "tensor", "1f1b", "ring"])
def test_compiled_blocks_equal_one_plain_process(strategy: str, world, alone) -> None:
    case = Case("next_token", strategy, dtype="fp32", compile=True)
    assert_all_equal(world(2).run(train, case, 2), reference(case), TOLERANCE["fp32"])


def test_the_oracle_can_fail(alone) -> None:
    """A different clipping norm is told apart: the comparison has teeth."""
    case = Case("next_token", "single")
    with pytest.raises(AssertionError):
        assert_equal(train(replace(case, clip_norm=0.05), 1), reference(case), 1e-5)
    ours = train(replace(case, steps=1), 1)
    ours.gradients["model.blocks.0.attention.query.weight"][0, 0] *= 1 + 1e-6
    with pytest.raises(AssertionError, match=r"gradients of model.blocks.0.attention.query.weight"):
        assert_equal(ours, train(replace(case, steps=1), 1), 1e-12)
