"""Watch the units that `fully_shard` and `replicate` exchange: all ranks must run them alike.

    rank 0:  block A, block B, back   rank 1:  block A, back   A's messages meet; B's meet another's

A unit is a block, or all the rest of a model. Its weights are gathered when it runs, and its
gradients are reduced when its backward pass ends, whatever other ranks do. Messages of two sizes
that meet end a process in gloo, or hang; of one size they are taken for each other's. So where
user's code decides what runs, ranks call what they run next through the store, before its messages,
until it is the same in each update. And for every model they compare how often each block has run
before the gradients are used (`unused_parameters`).
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dtrain.model.layout import is_foreign, layout_of, shared_names
from dtrain.task.batch import pieces

ALIKE = 2  # updates that run the same units in the same order: afterwards ranks call no more
AT_ONCE_S, POLL_S = 0.02, 0.001
RUN_ALIKE = (
    "fsdp and replicate exchange a block when it runs, so all ranks must run it alike; use "
    "strategy=ddp, allreduce or zero1"
)


class RollCall:
    """What the ranks of one model call before they run it.

    A rank counts itself in at its place in the update, under the name of the unit that it runs
    there. A rank that waits for long writes down its place, so that ranks that wait for each other
    notice it. While a rank runs what all ran in the updates before, it calls nothing and sends no
    messages. When it comes to another unit it calls again: so do all others, or they wait for it in
    the messages of a unit, which it does not send.

    Args:
        ranks: those that must run the same.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks, self.updates, self.alike = ranks, 0, 0
        self.before: list[str] = []  # what ran in the last update, in order
        self.now: list[str] = []
        self.same = True  # so far in this update
        self._store = dist.distributed_c10d._get_default_store()
        # every process makes as many models
        model_number = self._store.add(f"units/{dist.get_rank()}", 1)
        self._key = f"units/{'-'.join(map(str, ranks))}/{model_number}"
        self._times: Counter[str] = Counter()

    def begin_update(self) -> None:
        self.alike = self.alike + 1 if self.now == self.before else 0
        self.before, self.now, self.same = self.now, [], True
        self.updates += 1

    def call(self, unit: str) -> None:
        """Call a unit and wait for the other ranks, unless all ran it here in earlier updates.

        Raises:
            ValueError: some ranks call another unit; or, where they had called no more, nothing in
                half of the collectives' timeout. On every rank that waits.
            dist.DistError: some ranks do not come in that timeout.
        """
        place, settled = len(self.now), self.alike >= ALIKE
        self.same = self.same and self.before[place : place + 1] == [unit]
        self.now.append(unit)
        if settled and self.same:
            return
        limit = dist.distributed_c10d.default_pg_timeout.total_seconds() * (0.5 if settled else 1.0)
        key, at = f"{self._key}/{place}/{unit}", f"{self.updates}/{place}"
        self._times[key] += 1
        expected, since = len(self.ranks) * self._times[key], time.monotonic()
        wrote_place = False
        self._store.add(key, 1)
        while int(self._store.get(key)) < expected:
            if wrote_place:
                self._compare(at, unit)
            elif time.monotonic() - since > AT_ONCE_S:
                self._store.set(f"{self._key}/of/{dist.get_rank()}", f"{at}/{unit}")
                wrote_place = True
            if time.monotonic() - since > limit:
                if settled:
                    raise ValueError(_describe_difference(f"rank {dist.get_rank()} goes", unit))
                raise dist.DistError(f"not all ranks came to {unit} in {limit:g} s")
            time.sleep(POLL_S)

    def _compare(self, at: str, unit: str) -> None:
        """Raise ValueError if all ranks wait at this place, and not all for this unit."""
        keys = [f"{self._key}/of/{rank}" for rank in self.ranks]
        if not self._store.check(keys):
            return
        places = [place.decode() for place in self._store.multi_get(keys)]
        alike = places.count(f"{at}/{unit}")
        if all(place.startswith(f"{at}/") for place in places) and alike < len(places):
            raise ValueError(_describe_difference(f"{alike} of {len(places)} ranks go", unit))


def _describe_difference(who: str, unit: str) -> str:
    return f"{who} on to {unit}, and others to something else: {RUN_ALIKE}"


class Unit:
    """A unit of `fully_shard` or `replicate`: how often it ran, and which gradients it had.

    Args:
        group: torch's own parameter group, whose passes this watches.
        name: the block; "" for all the rest.
        roll: on which it is called; None: it is not.
    """

    def __init__(self, group: Any, name: str, roll: RollCall | None) -> None:
        self.group, self.name, self.roll, self.calls = group, name, roll, 0
        self.used: set[int] = set()  # its parameters that backward has reached in this update
        # a first backward pass, which gives no weight a gradient, is part of the loss
        self.twice = False
        self._forward = group.pre_forward
        self._backward = group.pre_backward
        self._complete = group.post_backward
        group.pre_forward, group.pre_backward, group.post_backward = (
            self.forward,
            self.backward,
            self.complete,
        )

    def forward(self, *inputs: Any) -> Any:
        self.calls += 1
        if self.name and self.roll:
            self.roll.call(self.name)
        return self._forward(*inputs)

    def backward(self, *options: Any) -> None:
        if self.roll and not self.name:
            self.roll.call("the backward pass")
        self._backward(*options)

    def complete(self, *none: Any) -> None:
        """Before gradients are exchanged, put zeros where this rank's rows have none.

        All ranks must send alike, and one unit's gradients in one format: what waits from earlier
        micro-batches may be in that of the sum.
        """
        parameters = [p for p in self.group.fsdp_params if hasattr(p, "_unsharded_param")]
        waiting = any(parameter.unsharded_accumulated_grad is not None for parameter in parameters)
        reached = waiting or any(
            parameter._unsharded_param.grad is not None for parameter in parameters
        )
        fill = self.group.reduce_grads and self.calls and (reached or not self.twice)
        for parameter in parameters:
            whole = parameter._unsharded_param
            if whole.grad is not None or parameter.unsharded_accumulated_grad is not None:
                self.used.add(id(parameter))
            elif fill and whole.requires_grad:
                whole.grad = torch.zeros_like(whole)
            if self.group.reduce_grads and waiting and parameter.unsharded_accumulated_grad is None:
                parameter.to_accumulated_grad_if_needed()
        self._complete(*none)


def watch_units(model: nn.Module, ranks: list[int]) -> None:
    """Watch every unit of the model, or of a stage, from now on; `ranks` share them."""
    roll = RollCall(ranks) if is_foreign(model) and len(ranks) > 1 else None
    model.watched = [  # type: ignore[assignment]
        Unit(group, name, roll)
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def units(model: nn.Module) -> list[Unit]:
    return [unit for piece in pieces(model) for unit in getattr(piece, "watched", ())]


def begin_update(model: nn.Module) -> None:
    for roll in filter(None, {unit.roll for unit in units(model)}):
        roll.begin_update()
    for unit in units(model):
        unit.calls = 0
        unit.used.clear()


def accumulate_losses(model: nn.Module, are: bool) -> None:
    """Note whether updates' losses hold gradients of the model."""
    for unit in units(model):
        unit.twice = are


def unused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters that backward has not reached: their gradients are zeros."""
    return [
        p.sharded_param
        for unit in units(model)
        for p in unit.group.fsdp_params
        if id(p) not in unit.used
    ]


def unit_calls(model: nn.Module) -> dict[str, int]:
    """Return how often each block has run; all the rest of a model runs on every rank."""
    return {unit.name: unit.calls for unit in units(model) if unit.name}


def refuse_sharing(model: nn.Module, strategy: str) -> None:
    """Raise ValueError for a weight in two units, each of which would keep its own copy."""
    path = layout_of(model).blocks

    def unit(name: str) -> str:
        return (
            ".".join(name.split(".")[: path.count(".") + 2])
            if path and name.startswith(f"{path}.")
            else ""
        )

    for one, other in shared_names(model).items():
        if unit(one) != unit(other):
            raise ValueError(
                f"{type(model).__name__} shares {other} with {one}, and strategy {strategy} "
                "exchanges each block by itself: use strategy=ddp, allreduce or zero1, or keep "
                "what is shared in one block or outside of all"
            )
