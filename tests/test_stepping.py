"""Optimizers that nobody has named: what they keep, and what they may be given parts of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases import ROWS, Case, Outcome, find, finish, plan_of
from cases import NextToken as Tokens
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.parallel.checks.optimizer import check_optimizer
from dtrain.parallel.optimizer import parameter_groups
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.run.checkpoint import Checkpoints, load
from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.deepspeed.zero import DeepSpeed
from dtrain.strategy.expert import ExpertParallel
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.local_sgd import LocalSGD
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.strategy.pipeline.strategy import PipelineParallel
from dtrain.strategy.replicate import Replicate
from dtrain.strategy.tensor.strategy import TensorParallel
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
        parameter.sub_(
            parameter.grad, alpha=group["lr"] * (parameter.norm() / parameter.grad.norm()).item()
        )


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


class NumpyNoise(Own):
    """Draws by numpy, once a step and weight."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad * (1 + numpy.random.randn()), alpha=group["lr"])


class Periodic(Own):
    """Every so many steps a larger one, by a count in a list or wherever `counted` says."""

    def __init__(self, params: Any, every: int = 16, kept: str = "list") -> None:
        super().__init__(params)
        self.every, self.kept, self.count = every, kept, [0]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.kept == "list":
            self.count[0] = self.now = (self.count[0] + 1) % self.every
        elif self.kept == "state":
            self.state["step"] = self.now = (self.state.get("step", 0) + 1) % self.every
        else:
            group = self.param_groups[0]
            group["counter"] = self.now = (group.get("counter", 0) + 1) % self.every
        super().step()
        del self.now

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"] * (10 if self.now == 0 else 1))


class Averaging(Own):
    """Begins with its `begins`-th step to average weights, and steps by the average."""

    def __init__(self, params: Any, begins: int = 3) -> None:
        super().__init__(params)
        self.begins = begins

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        parameter.sub_(parameter.grad, alpha=group["lr"])
        if state["step"] >= self.begins:
            mean = state.setdefault("mean", parameter.clone())
            mean.lerp_(parameter, 0.1)
            parameter.lerp_(mean, 0.1)


class ByGroup(Own):
    """Signs alone in its first group."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        first = group is self.param_groups[0]
        parameter.sub_(parameter.grad.sign() if first else parameter.grad, alpha=group["lr"])


class InBackward(Own):
    """Steps in the backward pass."""

    def __init__(self, params: Any, hook: str) -> None:
        super().__init__(params)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            getattr(parameter, hook)(lambda *_: None)

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None: ...


class ByAttribute(Own):
    """By what the model's author has written on a weight."""

    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad, alpha=group["lr"] * getattr(parameter, "scale", 1))


class Raising(Own):
    def move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert not group["lr"], "it wants another rate\nand more"


class NoRate(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"size": 1.0})


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
    "pipeline": PipelineParallel,
    "expert": ExpertParallel,
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
        (of(NumpyNoise), {*EVERY}),
        (of(ByGroup), {"tensor", "pipeline", "expert"}),
    ],
    ids=[
        "norm",
        "adafactor",
        "muon",
        "muon of matrices alone",
        "rows",
        "late",
        "large",
        "all",
        "noise",
        "numpy's noise",
        "group",
    ],
)
def test_what_compares_elements_is_refused_where_it_would_get_parts(
    make: Make, refused: set[str]
) -> None:
    said = {strategy: refusal(make, strategy) for strategy in ["", *EVERY]}
    assert {strategy for strategy, reason in said.items() if reason} == refused
    for reason in filter(None, said.values()):
        assert "AdamW" in reason and (
            "strategy=ddp or allreduce" in reason or "random numbers" in reason
        )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (of(InItsGroup), "cannot go on from a checkpoint"),
        (of(ByItself), "it keeps its count too"),
        (of(Lookahead), "it keeps 'counter' of group 0 too"),
        (of(Remembering), "keeps a list as 'history'"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "closure"),
        (of(torch.optim.SparseAdam), "cannot step here"),
        *(
            (of(Periodic, every=n, kept="group"), "it keeps 'counter' of group 0 too")
            for n in (2, 3, 4, 16)
        ),
        (of(Periodic), "it keeps its count too"),
        (of(Periodic, kept="state"), "it keeps 'step' of its state too"),
        (
            of(Raising),
            (
                "Raising cannot step here: AssertionError: it wants another rate "
                "\\(test_stepping.py, "
                "line \\d+\\)$"
            ),
        ),
        (of(NoRate), "NoRate has no 'lr' in its group 0, .* it has 'size'; call the rate lr"),
    ],
    ids=[
        "in its group",
        "by itself",
        "lookahead",
        "a list",
        "a closure",
        "sparse",
        "every 2nd",
        "every 3rd",
        "every 4th",
        "every 16th",
        "in a list",
        "in its state",
        "an assertion",
        "no rate",
    ],
)
def test_what_cannot_be_resumed_or_stepped_is_refused(make: Make, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_optimizer(make, {}, False)


def test_what_comes_late_goes_on() -> None:
    check_optimizer(of(Averaging), {}, False)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (DeepSpeed, "DeepSpeed"),
        (partial(LocalSGD, outer_momentum=0.9), "LocalSGD"),
        (ParameterServer, "ParameterServer"),
    ],
    ids=["engine", "local", "server"],
)
def test_what_comes_late_is_refused_where_it_could_not_be_resumed(
    strategy: Callable[[], Strategy], name: str
) -> None:
    """Else a run would write checkpoints that it then takes for another optimizer's."""
    plan = Plan((strategy(),), 2)
    with pytest.raises(
        ValueError,
        match=rf"Averaging begins to keep mean in step \d, and {name} resumes .*strategy=ddp",
    ):
        plan.check_optimizer(of(Averaging))
    plan.check_optimizer(of(Counting))


@pytest.mark.parametrize("hook", ["register_post_accumulate_grad_hook", "register_hook"])
def test_what_acts_in_the_backward_pass_is_for_one_backward_pass_a_step(hook: str) -> None:
    """Of whatever hook, under whatever strategy."""
    make = of(InBackward, hook=hook)
    Plan((), 1).check_optimizer(make)
    with pytest.raises(ValueError, match="InBackward acts in the backward pass"):
        Plan((), 1).check_optimizer(make, micro_batches=2)
    assert all("acts in the backward pass" in refusal(make, strategy) for strategy in EVERY)


def test_trying_an_optimizer_draws_no_random_number() -> None:
    before, numpys = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    check_optimizer(ELEMENTWISE["adamw"], {"rows": "FSDP"}, True)
    assert (
        torch.equal(torch.get_rng_state(), before) and (numpy.random.get_state()[1] == numpys).all()
    )


def _trained(folder: str, name: str, size: int, save: bool, resume: bool, make: Make) -> Outcome:
    task = Tokens(d_model=12, n_layers=1, n_heads=2)
    settings = Settings(4, global_batch_size=ROWS, warmup_steps=0)
    run = Trainer(task, plan_of(Case("", name), size).connect(), make, settings)
    if resume:
        run.load(
            partial(
                load,
                find(folder, Path(folder), Path(folder), fallback=False, note=print),
                late=True,
            )
        )
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
    """Of a checkpoint by one plan, under it and another; with numbers that begin anew the curve
    is another.
    """
    whole = world(2).run(_trained, str(tmp_path), "fsdp", 2, True, False, counting)[0]
    for name, size in (("fsdp", 2), ("zero1", 2)):
        for ours in world(2).run(_trained, str(tmp_path), name, size, False, True, counting):
            assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-12)


def averaging(model: nn.Module) -> Optimizer:
    return Averaging(model.parameters(), begins=2)


def test_states_that_come_late_are_saved_and_restored(world, tmp_path: Path) -> None:
    """No first step makes them: they are made as the checkpoint has them, whole or sharded."""
    whole = world(2).run(_trained, str(tmp_path), "fsdp", 2, True, False, averaging)[0]
    for name in ("fsdp", "zero1"):
        for ours in world(2).run(_trained, str(tmp_path), name, 2, False, True, averaging):
            assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-12)


class Written(Tokens):
    """On some weights of its model something is written."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**model)
        made = self.models["model"]

        def factory() -> nn.Module:
            model = made()
            for place, (_, parameter) in enumerate(sorted(model.named_parameters())):
                if place % 2:
                    parameter.scale = 5.0
            return model

        self.models = {"model": factory}


def by_attribute(model: nn.Module) -> Optimizer:
    return ByAttribute(parameter_groups(model), lr=0.05)


def _written(strategy: str, size: int) -> Outcome:
    task = Written(d_model=12, n_layers=2, n_heads=2)
    settings = Settings(3, global_batch_size=ROWS, warmup_steps=0)
    return finish(
        Trainer(task, plan_of(Case("", strategy), size).connect(), by_attribute, settings)
    )


@pytest.mark.parametrize("strategy", ["fsdp", "replicate", "tensor", "1f1b", "ddp"])
def test_what_is_written_on_weights_stays_on_them(strategy: str, world) -> None:
    expected = world(2).run(_written, "single", 1)[0]
    for each in world(2).run(_written, strategy, 2):
        assert each.losses == pytest.approx(expected.losses, rel=1e-12)


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
    return finish(
        Trainer(Tokens(**model), plan_of(Case("", strategy), size).connect(), adafactor, settings)
    )
