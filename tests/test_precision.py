"""In which formats a run computes, keeps weights and adds up gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, NextToken, Outcome, keeping_gradients, plan_of
from torch import Tensor, nn

from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy
from dtrain.strategy.fsdp import FSDP
from dtrain.strategy.replicate import Replicate
from dtrain.task.base import Supervised, Task
from dtrain.task.batch import Batch
from dtrain.train import Settings, Trainer

NARROW, WIDE = torch.bfloat16, torch.float32
SMALL = 2.0**-9  # beside 1 it is lost in bf16, which has 8 bits, and not in fp32


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("strategy", ["single", "ddp", "replicate", "fsdp", "zero2"])
def test_products_are_in_the_format_that_is_asked_for(strategy: str, alone) -> None:
    """Under dtype=bf16 each linear layer gives bf16; weights and moments stay in fp32."""
    for dtype, products in (("bf16", NARROW), ("fp32", WIDE)):
        plan = plan_of(Case("", strategy, dtype), 1).connect()
        made = Trainer(NextToken(rows=2, tied=False), plan, sgd, Settings(1, global_batch_size=2))
        given: dict[str, torch.dtype] = {}

        def note(name: str, into: dict[str, torch.dtype], *given: Any) -> None:
            into[name] = given[-1].dtype

        model = plan.unwrap(made.models["model"])
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(note, name, given))
        list(made.steps())
        assert set(given.values()) == {products} and len(given) == 2 * 6 + 1
        for kind in ("parameters", "optimizer"):
            kept = made.local_tensors(kind)
            assert {tensor.dtype for tensor in kept} == {WIDE}
            assert len(kept) == len(list(model.parameters()))


class OneProduct(Task):
    """A gradient is the mean of the ranks' x: 1 on one rank, little on the other."""

    def __init__(self) -> None:
        self.models = {"model": partial(nn.Linear, 2, 2, bias=False)}
        self.updates = (Supervised("model", ("x",), lambda y, batch: y.float().sum(), self._rows),)

    def _rows(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["x"]))

    def batch(self, step: int) -> Batch:
        return {"x": torch.tensor([[1.0, 1.0], [SMALL, -SMALL]])}

    def size(self, batch: Batch) -> int:
        return len(batch["x"])


def gradient(strategy: type[Strategy], size: int, precision: Precision) -> Tensor:
    plan = Plan.of([strategy(size)], size, precision=precision).connect()
    made = Trainer(OneProduct(), plan, sgd, Settings(1, global_batch_size=2))
    outcome = Outcome()
    with keeping_gradients(made, outcome):
        list(made.steps())
    return outcome.gradients["model.weight"]


@pytest.mark.parametrize("strategy", [FSDP, Replicate])
def test_gradients_add_up_in_the_format_that_is_asked_for(strategy: type[Strategy], world) -> None:
    """In fp32, if nothing is said: what bf16 would round away arrives."""
    exact = torch.tensor([0.5 + SMALL / 2, 0.5 - SMALL / 2]).expand(2, 2)
    for reduce, expected in ((None, exact), ("fp32", exact), ("bf16", exact.bfloat16().float())):
        for found in world(2).run(gradient, strategy, 2, Precision("bf16", reduce=reduce)):
            assert torch.equal(found, expected), reduce
    assert not torch.equal(exact, exact.bfloat16().float())
