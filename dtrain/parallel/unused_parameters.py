"""Give every rank gradients of the parameters that any rank's rows used, and of no others.

    rank 0's rows use block A, rank 1's block B:  fill          A: g, 0   B: 0, g   exchanged
    no rank's rows use block C:                   drop_unused   C: none on both     not stepped

A row may choose what it runs through: experts, adapters, layers that are dropped. One process has
a gradient of whatever any row used, and none of what no row used. So before gradients are exchanged
a rank puts zeros where its own rows used nothing, and afterwards all ranks agree by one small
all-reduce on what none of them used.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.parallel.fsdp_units import RUN_ALIKE
from dtrain.parallel.optimizer import OPTIMIZER_STATE
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import ParallelContext
from dtrain.task.batch import pieces

ABSENT = 1 << 30  # runs of a unit that this rank does not have: neither the most nor the least


class UnusedParameters:
    """The gradients that one model lacks on some ranks, or on all.

    Collective: every rank makes one, and calls `drop_unused` and `check_units`.

    Args:
        model: as `plan.parallelize` made it.
        plan: connected.
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
        self._names = _names_on_all_stages(list(self._parameters), plan)
        self._units = _names_on_all_stages(list(plan.unit_calls(model)), plan)

    def fill(self) -> None:
        """Put zeros where a parameter trains and has no gradient on this rank."""
        self._unused = {id(parameter) for parameter in self.plan.unused(self.model)}
        for parameter in (p for own in self._parameters.values() for p in own):
            if parameter.grad is None:
                self._unused.add(id(parameter))
                parameter.grad = torch.zeros_like(parameter)

    def drop_unused(self) -> None:
        """Take the gradients away from parameters that no rank has used.

        Raises:
            ValueError: see `check_units`.
        """
        if not self.plan.strategies:
            return
        used = [
            int(any(id(p) not in self._unused for p in self._parameters[name]))
            for name in self._names
        ]
        largest = self._most([*used, *self._runs()])
        self._compare(largest[len(used) :])
        for name, used_by_a_rank in zip(self._names, largest, strict=False):
            for parameter in () if used_by_a_rank else self._parameters.get(name, ()):
                parameter.grad = None

    def check_units(self) -> None:
        """Compare how often ranks ran each unit since the update or the evaluation began.

        Raises:
            ValueError: they differ; on every rank.
        """
        if self._units:
            self._compare(self._most(self._runs()))

    def _runs(self) -> list[int]:
        """Return how often each unit ran, and the same below zero: its largest is the least."""
        calls = self.plan.unit_calls(self.model)
        return [calls.get(name, -ABSENT) for name in self._units] + [
            -calls.get(name, ABSENT) for name in self._units
        ]

    def _most(self, numbers: list[int]) -> list[int]:
        largest = torch.tensor(numbers, dtype=torch.int32, device=self.plan.device)
        return list(self.plan.max_over_ranks(largest).tolist())

    def _compare(self, runs: list[int]) -> None:
        for name, high, low in zip(self._units, runs, runs[len(self._units) :], strict=False):
            if high != -low:
                raise ValueError(
                    f"{name} ran {high} times for some rank's rows and {-low} times for another's: "
                    f"{RUN_ALIKE}"
                )


def reached_parameters(loss: Tensor) -> set[int]:
    """Return the ids of the parameters to which a backward pass from `loss` hands a gradient."""
    reached, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (parameter := getattr(node, "variable", None)) is not None:
            reached.add(id(parameter))
        ahead += [following for following, _ in node.next_functions]
    return reached


def refuse_unused(model: nn.Module, used: set[int], plan: ParallelContext, engine: str) -> None:
    """Refuse parameters that some rank's rows have not used: an engine would step them anyway.

    Collective.

    Raises:
        ValueError: names the parameters and the remedy; on every rank.
    """
    own = {
        name: id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    names = _names_on_all_stages(list(own), plan)
    lacking = torch.tensor(
        [name in own and own[name] not in used for name in names],
        dtype=torch.uint8,
        device=plan.device,
    )
    lacks = plan.max_over_ranks(lacking).tolist()
    if unused := [name for name, some_rank in zip(names, lacks, strict=True) if some_rank]:
        raise ValueError(
            f"{unused[0]} (one of {len(unused)} weights) is not used by the rows of some rank's "
            f"micro-batch, and {engine} steps every weight in every step: use strategy=ddp, zero1 "
            "or fsdp, or freeze what is never used (requires_grad=False)"
        )


def with_zero_states(
    tensors: dict[str, Tensor], model: nn.Module, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Add zeros for states that other ranks of the group have, and sort all. Collective."""
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    every: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}] * group.size()
    dist.all_gather_object(every, shapes, group=group)
    parameters, complete = dict(model.named_parameters()), {}
    on_any_rank = {name: shape for each in every for name, shape in each.items()}
    for name, (shape, dtype) in sorted(on_any_rank.items()):
        parameter = parameters.get(name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0])
        if name in tensors:
            complete[name] = tensors[name]
        elif parameter is not None and tuple(parameter.shape) == shape:
            complete[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            complete[name] = torch.zeros(shape, dtype=dtype)
    return complete


def _names_on_all_stages(names: list[str], plan: ParallelContext) -> list[str]:
    """Return the names that ranks along `pp` have, in one order. Collective."""
    if not plan.strategy_on("pp"):
        return names
    group = plan.mesh["pp"].get_group()
    every: list[list[str]] = [[]] * group.size()
    dist.all_gather_object(every, names, group=group)
    return list(dict.fromkeys(name for each in every for name in each))
