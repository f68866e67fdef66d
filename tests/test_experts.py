"""Experts spread over ranks: equal to one process, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from cases import (
    MLP,
    ROWS,
    TOLERANCE,
    MaskedToken,
    NextToken,
    Outcome,
    adamw,
    assert_equal,
    find,
    finish,
)
from torch import nn

from dtrain.model.transformer import Transformer
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy, local_part
from dtrain.run.checkpoint import Checkpoints, load
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.expert import ExpertParallel
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.replicate import Replicate
from dtrain.train import Settings, Trainer

SAVED_AT = 4
# bf16 has 8 bits: relative 4e-3, carried on by twenty steps, and a token in doubt goes elsewhere
DRIFT = 2e-2

TASKS = {"next_token": NextToken, "masked_token": MaskedToken}
PLANS: dict[str, tuple[int, list[Callable[[], Strategy]]]] = {
    "single": (1, []),
    "ep2": (2, [ExpertParallel]),
    "ep4": (4, [ExpertParallel]),
    "ep2_fsdp2": (4, [partial(ExpertParallel, 2), FSDP]),
    "ep2_zero2": (4, [partial(ExpertParallel, 2), partial(FSDP, reshard_after_forward=False)]),
    "ep2_replicate2": (4, [partial(ExpertParallel, 2), Replicate]),
    "ep2_allreduce2": (4, [partial(ExpertParallel, 2), AllReduce]),
}


@dataclass(frozen=True)
class Case:
    plan: str
    task: str = "next_token"
    dtype: str = "fp64"
    micro_batch_size: int | None = None
    recompute: bool = False
    top_k: int = 2
    capacity_factor: float | None = None
    balance: str = "bias"
    activation: str = "gelu"
    n_experts: int = 4
    crowded: bool = False  # does every token want the first expert?
    steps: int = 8


def trainer(case: Case) -> Trainer:
    task = TASKS[case.task](
        n_experts=case.n_experts,
        top_k=case.top_k,
        capacity_factor=case.capacity_factor,
        balance=case.balance,
        balance_rate=0.01,
        activation=case.activation,
        d_ff=20,
    )
    size, strategies = PLANS[case.plan]
    plan = Plan.of(
        [make() for make in strategies],
        size,
        precision=Precision(case.dtype),
        recompute=case.recompute,
    )
    settings = Settings(
        case.steps,
        global_batch_size=ROWS,
        micro_batch_size=case.micro_batch_size,
        warmup_steps=3,
        min_lr_ratio=0.1,
    )
    made = Trainer(task, plan.connect(), adamw, settings)
    if case.crowded:
        for name, buffer in made.models["model"].named_buffers():
            if name.endswith("feedforward.bias"):
                buffer[0] = 10.0
    return made


def train(case: Case) -> Outcome:
    return finish(trainer(case))


@lru_cache
def reference(case: Case) -> Outcome:
    return train(case)


def cases() -> list[Case]:
    found = []
    for plan in PLANS.keys() - {"single"}:
        found += [Case(plan, steps=20 if plan == "ep2_fsdp2" else 8)]
        found += [Case(plan, "masked_token", micro_batch_size=3 if plan == "ep2" else 1, top_k=1)]
    for plan in ("ep4", "ep2_fsdp2", "ep2_replicate2"):
        found += [
            Case(plan, dtype="fp32"),
            Case(plan, recompute=True, balance="loss", activation="swiglu"),
        ]
    for top_k in (1, 2):
        for balance in ("none", "loss", "bias"):
            found += [
                Case("ep4", "masked_token", top_k=top_k, balance=balance),
                Case("ep4", top_k=top_k, balance=balance, capacity_factor=0.75, micro_batch_size=1),
            ]
    # 3 experts a rank, 2 and 1 a shard
    found += [Case("ep4", top_k=1, crowded=True), Case("ep2_fsdp2", n_experts=6)]
    return sorted(found, key=str)


QUICK = [
    Case("ep2", "masked_token", micro_batch_size=3, top_k=1, steps=4),
    Case("ep4", "masked_token", top_k=2, balance="bias", steps=4),
    Case("ep4", top_k=2, balance="loss", capacity_factor=0.75, micro_batch_size=1, steps=4),
    Case("ep4", top_k=1, crowded=True, steps=4),
    # 3 experts a rank, 2 and 1 a shard
    Case("ep2_fsdp2", n_experts=6, recompute=True, activation="swiglu", steps=4),
    Case("ep2_replicate2", "masked_token", dtype="fp32", balance="loss", top_k=1, steps=4),
]


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.deep) for case in cases())], ids=str
)
def test_spread_experts_equal_one_process(case: Case, world, alone) -> None:
    expected = reference(replace(case, plan="single", micro_batch_size=None, recompute=False))
    for ours in world(PLANS[case.plan][0]).run(train, case):
        assert_equal(ours, expected, TOLERANCE[case.dtype])


def test_the_bias_moves_and_the_balance_loss_acts(alone) -> None:
    """What the parity above compares is there: the three ways to balance train three different
    models.
    """
    none, loss, bias = (
        reference(Case("single", balance=balance, steps=20)) for balance in ("none", "loss", "bias")
    )
    assert none.losses != loss.losses != bias.losses != none.losses
    assert bias.weights["model.blocks.0.feedforward.bias"].abs().max() >= 0.01


def _share(case: Case) -> float:
    parameters = dict(trainer(case).models["model"].named_parameters())
    experts = [p for name, p in parameters.items() if ".experts." in name]
    return sum(local_part(p).numel() for p in experts) / sum(p.numel() for p in experts)


def test_each_rank_holds_its_share_of_the_experts(world) -> None:
    assert world(4).run(_share, Case("ep4")) == [0.25] * 4
    assert world(4).run(_share, Case("ep2_replicate2")) == [0.5] * 4
    assert world(4).run(_share, Case("ep2_fsdp2")) == [0.25] * 4


def _save(case: Case, folder: str) -> None:
    made = trainer(case)
    for step in made.steps():
        if step.step == SAVED_AT:
            Checkpoints(Path(folder), keep_last=1).save(
                step.step, made.state(), {"tokens": made.tokens}
            )
            return


def _resume(case: Case, folder: str) -> Outcome:
    made = trainer(case)
    made.load(partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print)))
    made.next_step = SAVED_AT
    outcome = finish(made)
    outcome.gradients.clear()  # of its first step, which is not that of the whole run
    return outcome


@pytest.mark.parametrize("n_experts", [pytest.param(4, marks=pytest.mark.deep), 6])
def test_what_spread_experts_save_every_plan_resumes(
    n_experts: int, world, alone, tmp_path: Path
) -> None:
    case = Case("ep2_fsdp2", steps=SAVED_AT + 4, n_experts=n_experts)
    whole_run = reference(replace(case, plan="single"))
    expected = replace(
        whole_run, losses=whole_run.losses[SAVED_AT:], norms=whole_run.norms[SAVED_AT:]
    )
    world(4).run(_save, case, str(tmp_path))
    assert_equal(_resume(replace(case, plan="single"), str(tmp_path)), expected, TOLERANCE["fp64"])
    for plan in ("ep2", "ep2_fsdp2", "ep2_replicate2"):
        for ours in world(PLANS[plan][0]).run(_resume, replace(case, plan=plan), str(tmp_path)):
            assert_equal(ours, expected, TOLERANCE["fp64"])


@pytest.mark.parametrize("plan", ["ep2", pytest.param("ep2_fsdp2", marks=pytest.mark.deep)])
def test_bf16_drifts_no_more_than_its_rounding(plan: str, world, alone) -> None:
    for ours in world(PLANS[plan][0]).run(train, Case(plan, dtype="bf16")):
        assert ours.losses == pytest.approx(
            reference(Case("single", dtype="fp32")).losses, rel=DRIFT
        )


@pytest.mark.parametrize(
    ("factory", "degree", "message"),
    [
        (
            partial(MLP, 6, 10, 1),
            2,
            "MLP has no experts .model.n_experts=0.: nothing to spread over ep; use model=moe",
        ),
        (
            partial(Transformer, 61, 12, 24, 2, 4),
            2,
            "Transformer has no experts .model.n_experts=0.: nothing to spread",
        ),
        (
            partial(Transformer, 61, 12, 24, 2, 4, n_experts=6),
            4,
            "n_experts=6 is not divisible by ep=4: use 1, 2, 3",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused(
    factory: Callable[[], nn.Module], degree: int, message: str
) -> None:
    with torch.device("meta"):
        model = factory()
    with pytest.raises(ValueError, match=message):
        Plan.of([ExpertParallel(degree)], degree).check_model(model)
