"""Which parameters have a gradient: on every rank those of which one process would have one.

    rank 0's rows use block A, rank 1's block B:  fill    A: g, 0   B: 0, g   a message for each
    neither uses block C:                         settle  C: none, on both    no step, no state

A row, or a rank's rows, may choose what they run through: experts, adapters, layers that are
dropped. One process has a gradient of whatever any row used, and none of what no row used. So a
rank gives zeros to what its own rows did not use before gradients are exchanged, and after that all
ranks agree by one small all-reduce on what nobody used.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import ParallelContext
from dtrain.task.batch import pieces

NEVER = 1 << 30  # runs of a unit that this rank does not have: neither the most nor the least


class UnusedParameters:
    """The gradients of one model that is trained. Making one and `settle` are collectives.

    Args:
        model, plan: as the plan has made it.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self._unused: set[int] = set()
        # two stages may share one
        self._parameters: dict[str, list[nn.Parameter]] = defaultdict(list)
        for piece in pieces(model) if plan.strategies else ():
            for name, parameter in plan.unwrap(piece).named_parameters():
                if parameter.requires_grad:
                    self._parameters[name].append(parameter)
        self._names = _everywhere(list(self._parameters), plan)
        self._units = _everywhere(list(plan.unit_calls(model)), plan)

    def fill(self) -> None:
        """Zeros for what trains and has no gradient here."""
        self._unused = {id(parameter) for parameter in self.plan.unused(self.model)}
        for parameter in (p for own in self._parameters.values() for p in own):
            if parameter.grad is None:
                self._unused.add(id(parameter))
                parameter.grad = torch.zeros_like(parameter)

    def settle(self) -> None:
        """No gradient for what no rank has used.

        Raises:
            ValueError: as `check_units` does.
        """
        if not self.plan.strategies:
            return
        used = [
            int(any(id(p) not in self._unused for p in self._parameters[name]))
            for name in self._names
        ]
        found = self._most([*used, *self._runs()])
        self._compare(found[len(used) :])
        for name, has in zip(self._names, found, strict=False):
            for parameter in () if has else self._parameters.get(name, ()):
                parameter.grad = None

    def check_units(self) -> None:
        """Compare what all ranks must run alike.

        Raises:
            ValueError: it was not, since the update or evaluation began; on every rank.
        """
        if self._units:
            self._compare(self._most(self._runs()))

    def _runs(self) -> list[int]:
        """How often each unit ran; and the same below zero, so that the largest of those tells
        the least.
        """
        calls = self.plan.unit_calls(self.model)
        return [calls.get(name, -NEVER) for name in self._units] + [
            -calls.get(name, NEVER) for name in self._units
        ]

    def _most(self, numbers: list[int]) -> list[int]:
        return list(
            self.plan.most(
                torch.tensor(numbers, dtype=torch.int32, device=self.plan.device)
            ).tolist()
        )

    def _compare(self, runs: list[int]) -> None:
        for name, high, low in zip(self._units, runs, runs[len(self._units) :], strict=False):
            if high != -low:
                raise ValueError(
                    f"{name} ran {high} times for some rank's rows and {-low} times for another's: "
                    "fsdp and replicate exchange a block when it runs, so all ranks must run it "
                    "alike; use strategy=ddp, allreduce or zero1"
                )


def reached_parameters(loss: Tensor) -> set[int]:
    """The parameters to which a backward pass from `loss` would hand a gradient, by their ids."""
    found, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (parameter := getattr(node, "variable", None)) is not None:
            found.add(id(parameter))
        ahead += [following for following, _ in node.next_functions]
    return found


def refuse_unused(model: nn.Module, used: set[int], plan: ParallelContext, engine: str) -> None:
    """Refuse to go on where some rank's rows have not used a parameter: for engines that would step
    it anyway.

    A collective.

    Raises:
        ValueError: names the parameters and what would do; on every rank.
    """
    own = {
        name: id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    names = _everywhere(list(own), plan)
    lacking = [int(name in own and own[name] not in used) for name in names]
    found = plan.most(torch.tensor(lacking, dtype=torch.uint8, device=plan.device)).tolist()
    if unused := [name for name, lacks in zip(names, found, strict=True) if lacks]:
        raise ValueError(
            f"{unused[0]} (one of {len(unused)} weights) is not used by the rows of some rank's "
            f"micro-batch, and {engine} steps every weight in every step: use strategy=ddp, zero1 "
            "or fsdp, or freeze what is never used (requires_grad=False)"
        )


def with_zero_states(
    tensors: dict[str, Tensor], model: nn.Module, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """With zeros for states that other ranks of the group have and this one does not, in one order.

    A collective.
    """
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    every: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}] * group.size()
    dist.all_gather_object(every, shapes, group=group)
    parameters, found = dict(model.named_parameters()), {}
    for name, (shape, dtype) in sorted(
        (item for each in every for item in each.items()), key=lambda item: item[0]
    ):
        parameter = parameters.get(name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0])
        if name in tensors:
            found[name] = tensors[name]
        elif parameter is not None and tuple(parameter.shape) == shape:
            found[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            found[name] = torch.zeros(shape, dtype=dtype)
    return found


def _everywhere(names: list[str], plan: ParallelContext) -> list[str]:
    """The names that ranks along `pp` have, in one order; elsewhere all have the same.

    A collective.
    """
    if not plan.strategy_on("pp"):
        return names
    group = plan.mesh["pp"].get_group()
    every: list[list[str]] = [[]] * group.size()
    dist.all_gather_object(every, names, group=group)
    return list(dict.fromkeys(name for each in every for name in each))
