"""Optimizers that nobody has named: what they keep, and what they may be given parts of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ROWS, Case, Outcome, finish, plan_of
from cases import NextToken as Tokens
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.checkpoint import Checkpoints, load
from dtrain.optimizer import parameter_groups
from dtrain.plan import Plan
from dtrain.saved import find
from dtrain.stepping import check_optimizer
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.base import Strategy
from dtrain.strategy.deepspeed import DeepSpeed
from dtrain.strategy.expert import Expert
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.parameter_server import ParameterServer
from dtrain.strategy.pipeline import Pipeline
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor import TensorParallel
from dtrain.strategy.zero1 import Zero1
from dtrain.train import Settings, Trainer

Make = Callable[[nn.Module], Optimizer]


class Own(Optimizer):
    """Steps by a rule of one's own."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, self.state[parameter], group)

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Counting(Own):
    """Counts its steps in a number of Python's, and whether it has begun."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "begun": False, "sum": torch.zeros_like(parameter), "none": None}
        state["step"] += 1
        state["sum"] += parameter.grad
        parameter.sub_(state["sum"], alpha=group["lr"] / state["step"] ** (1 + state["begun"]))
        state["begun"] = True


class Remembering(Own):
    """Keeps a list."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("history", []).append(parameter.grad.clone())
        parameter.sub_(sum(state["history"]), alpha=group["lr"])


class InItsGroup(Own):
    """Counts in its group, which belongs to no weight."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        group["count"] = group.get("count", 0) + 1
        parameter.sub_(parameter.grad, alpha=group["lr"] / group["count"])


class ByItself(Own):
    """Counts in the optimizer."""

    count = 0

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.count += 1
        parameter.sub_(parameter.grad, alpha=group["lr"] / self.count)


class ByNorm(Own):
    """LARS's rule: by the norm of a whole weight."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"] * (parameter.norm() / parameter.grad.norm()).item())


class ByRows(Own):
    """By the norm of each row: rows may be given out, columns may not."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        scale = parameter.grad.norm(dim=1, keepdim=True) if parameter.ndim > 1 else 1
        parameter.sub_(parameter.grad / scale, alpha=group["lr"])


class ByAll(Own):
    """By the norm of all weights together."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.whole = torch.stack([g.norm() for g in gradients]).norm().item()
        super().step()

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"] / self.whole)


class Lookahead(Own):
    """Every so many steps weights go back half the way, as a count in the group says."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["counter"] = group.get("counter", 0) + 1
        super().step()

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("slow", parameter.clone())
        parameter.sub_(parameter.grad, alpha=group["lr"])
        if group["counter"] % 100 == 0:
            parameter.lerp_(state["slow"], 0.5)


class Late(Own):
    """From its fifth step on by the norm of the gradient, as Shampoo begins."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        scale = parameter.grad.norm() if state["step"] > 5 else 1.0
        parameter.sub_(parameter.grad / scale, alpha=group["lr"])


class Large(Own):
    """Rounds the gradients of what is large enough, by blocks, as optimizers with 8 bits do."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = parameter.grad.flatten()
        if gradient.numel() >= 4096:
            most = torch.cat([each.abs().max().expand(len(each)) for each in gradient.split(256)])
            gradient = (gradient / most * 127).round() * most / 127
        parameter.sub_(gradient.view_as(parameter), alpha=group["lr"])


class Noisy(Own):
    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad + torch.randn_like(parameter), alpha=group["lr"])


def of(kind: type[Optimizer], **settings: Any) -> Make:
    return lambda model: kind(parameter_groups(model), **settings)


ELEMENTWISE = {
    "adamw": of(torch.optim.AdamW, fused=True),
    "sgd": of(torch.optim.SGD, lr=0.1),
    "momentum": of(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "rmsprop": of(torch.optim.RMSprop),
    "adagrad": of(torch.optim.Adagrad),
    "nadam": of(torch.optim.NAdam),
    "rprop": of(torch.optim.Rprop),
    "counting": of(Counting),
    "diverging": of(torch.optim.AdamW, lr=1e30),
}
STEPPED: dict[str, Callable[[], Strategy]] = {
    "zero1": Zero1,
    "fsdp": FSDP,
    "tensor": TensorParallel,
    "pipeline": Pipeline,
    "expert": Expert,
    "deepspeed": lambda: DeepSpeed(2, {"zero_optimization": {"stage": 1}}),
    "servers": lambda: ParameterServer(3, servers=2),
}
WHOLE: dict[str, Callable[[], Strategy]] = {
    "allreduce": AllReduce,
    "replicate": Replicate,
    "server": ParameterServer,
}
EVERY = STEPPED | WHOLE


def refusal(make: Make, strategy: str) -> str:
    strategies = [EVERY[strategy]()] if strategy else []
    plan = Plan(tuple(strategies), 2 if strategy else 1)
    try:
        plan.check_optimizer(make)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_takes_each_element_by_itself_goes_with_every_strategy(name: str) -> None:
    assert not [strategy for strategy in ["", *EVERY] if refusal(ELEMENTWISE[name], strategy)]


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (of(ByNorm), {*STEPPED} - {"zero1", "pipeline", "servers"}),
        (of(torch.optim.Adafactor), {*STEPPED} - {"zero1", "pipeline", "servers"}),
        (
            lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2]),
            {*STEPPED} - {"zero1", "pipeline", "servers"},
        ),
        (
            lambda model: torch.optim.Muon(model.parameters()),
            {*STEPPED} - {"zero1", "pipeline", "servers"},
        ),
        (of(ByRows), {"tensor", "deepspeed"}),
        (of(Late), {*STEPPED} - {"zero1", "pipeline", "servers"}),
        (of(Large), {*STEPPED} - {"zero1", "pipeline", "servers"}),
        (of(ByAll), {*STEPPED}),
        (of(Noisy), {*EVERY}),
    ],
    ids=["norm", "adafactor", "muon", "muon of matrices alone", "rows", "late", "large", "all", "noise"],
)
def test_what_compares_elements_is_refused_where_it_would_get_parts(make: Make, refused: set[str]) -> None:
    said = {strategy: refusal(make, strategy) for strategy in ["", *EVERY]}
    assert {strategy for strategy, reason in said.items() if reason} == refused
    for reason in filter(None, said.values()):
        assert "AdamW" in reason and ("strategy=ddp or allreduce" in reason or "random numbers" in reason)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (of(InItsGroup), "cannot go on from a checkpoint"),
        (of(ByItself), "counts steps in its count"),
        (of(Lookahead), "counts steps in 'counter' of group 0"),
        (of(Remembering), "keeps a list as 'history'"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "closure"),
        (of(torch.optim.SparseAdam), "cannot step here"),
    ],
    ids=["in its group", "by itself", "lookahead", "a list", "a closure", "sparse"],
)
def test_what_cannot_be_resumed_or_stepped_is_refused(make: Make, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_optimizer(make, {}, False)


def test_trying_an_optimizer_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    check_optimizer(ELEMENTWISE["adamw"], {"rows": "FSDP"}, True)
    assert torch.equal(torch.get_rng_state(), before)


def _trained(folder: str, name: str, size: int, save: bool, resume: bool, make: Make) -> Outcome:
    task = Tokens(d_model=12, n_layers=1, n_heads=2)
    settings = Settings(4, global_batch_size=ROWS, warmup_steps=0)
    run = Trainer(task, plan_of(Case("", name), size).connect(), make, settings)
    if resume:
        run.load(partial(load, find(folder, Path(folder), Path(folder), fallback=False, note=print)))
        run.next_step = 2
    outcome = Outcome()
    for step in run.steps():
        outcome.losses.append(step.loss)
        if save and step.step == 2:
            Checkpoints(Path(folder), keep_last=1).save(2, run.state(), {"tokens": 0})
    return outcome


def counting(model: nn.Module) -> Optimizer:
    return Counting(model.parameters(), lr=0.5)


def test_numbers_of_pythons_are_saved_and_restored(world, tmp_path: Path) -> None:
    """Of a checkpoint by one plan, under it and another; with numbers that begin anew the curve is another."""
    whole = world(2).run(_trained, str(tmp_path), "fsdp", 2, True, False, counting)[0]
    for name, size in (("fsdp", 2), ("zero1", 2)):
        for ours in world(2).run(_trained, str(tmp_path), name, size, False, True, counting):
            assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-12)


def adafactor(model: nn.Module) -> Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.05)


@pytest.mark.parametrize("strategy", ["replicate", "zero1", "1f1b", "ddp"])
def test_adafactor_is_that_of_one_process_where_weights_are_whole(strategy: str, world) -> None:
    model = {"d_model": 12, "n_layers": 2, "n_heads": 2}
    ours = world(2).run(_finished, strategy, 2, model)
    expected = world(2).run(_finished, "single", 1, model)[0]
    for each in ours:
        assert each.losses == pytest.approx(expected.losses, rel=1e-12)


def _finished(strategy: str, size: int, model: dict[str, Any]) -> Outcome:
    settings = Settings(3, global_batch_size=ROWS, warmup_steps=0)
    return finish(Trainer(Tokens(**model), plan_of(Case("", strategy), size).connect(), adafactor, settings))
