"""What `fully_shard` and `replicate` exchange together: a block, or all the rest; and whether all
ranks run it alike.

    rank 0:  block A, block B, back   rank 1:  block A, back   A's messages meet; B's meet another's

A unit's weights are gathered when it runs, and its gradients are reduced when its backward pass
ends, whatever other ranks do. Messages of two sizes that meet end a process in gloo, or hang; of
one size they are taken for each other's. So where somebody else's code decides what runs, ranks
call what they run next through the store, before its messages, until it is the same in each update;
and of every model they compare how often each block has run before anything is done with what came
of it (`presence`).
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

ALIKE = 2  # updates in which the same units run in the same order: then ranks call no more
AT_ONCE_S, POLL_S = 0.02, 0.001


class RollCall:
    """What the ranks of one model say that they run next.

    Each counts itself in at a place of the update, under the name of what it runs there; who waits
    for long writes where it is, so that those who wait for each other find it out. As long as a
    rank runs what all have run in the updates before it calls nothing, and needs no messages. When
    it comes to run something else it calls again: so do all, or they wait for it in the messages of
    a unit, which it does not send.

    Args:
        ranks: who must run the same.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks, self.updates, self.alike = ranks, 0, 0
        self.before: list[str] = []  # what ran in the last update, in order
        self.now: list[str] = []
        self.same = True  # so far in this update
        self._store = dist.distributed_c10d._get_default_store()
        # models of this process: as many as of the others
        made = self._store.add(f"units/{dist.get_rank()}", 1)
        self._key = f"units/{'-'.join(map(str, ranks))}/{made}"
        self._times: Counter[str] = Counter()

    def begin_update(self) -> None:
        self.alike = self.alike + 1 if self.now == self.before else 0
        self.before, self.now, self.same = self.now, [], True
        self.updates += 1

    def call(self, unit: str) -> None:
        """Say it, and wait for the others to say theirs, where this rank has not run the same in
        the updates before.

        Raises:
            ValueError: some say another, or say nothing for half of the collectives' timeout where
                they had called no more; on every rank that waits.
            dist.DistError: some do not come in that timeout.
        """
        place, settled = len(self.now), self.alike >= ALIKE
        self.same = self.same and self.before[place : place + 1] == [unit]
        self.now.append(unit)
        if settled and self.same:
            return
        limit = dist.distributed_c10d.default_pg_timeout.total_seconds() * (0.5 if settled else 1.0)
        key, at = f"{self._key}/{place}/{unit}", f"{self.updates}/{place}"
        self._times[key] += 1
        expected, since, said = len(self.ranks) * self._times[key], time.monotonic(), False
        self._store.add(key, 1)
        while int(self._store.get(key)) < expected:
            if said:
                self._compare(at, unit)
            elif time.monotonic() - since > AT_ONCE_S:
                self._store.set(f"{self._key}/of/{dist.get_rank()}", f"{at}/{unit}")
                said = True
            if time.monotonic() - since > limit:
                if settled:
                    raise ValueError(_apart(f"rank {dist.get_rank()} goes", unit))
                raise dist.DistError(f"not all ranks came to {unit} in {limit:g} s")
            time.sleep(POLL_S)

    def _compare(self, at: str, unit: str) -> None:
        """Raise ValueError if all ranks wait at this place, and not all for this unit."""
        keys = [f"{self._key}/of/{rank}" for rank in self.ranks]
        if not self._store.check(keys):
            return
        said = [each.decode() for each in self._store.multi_get(keys)]
        if all(each.startswith(f"{at}/") for each in said) and (
            alike := said.count(f"{at}/{unit}")
        ) < len(said):
            raise ValueError(_apart(f"{alike} of {len(said)} ranks go", unit))


def _apart(who: str, unit: str) -> str:
    return (
        f"{who} on to {unit}, and others to something else: fsdp and replicate exchange a block "
        "when it runs, so all ranks must run it alike; use strategy=ddp, allreduce or zero1"
    )


class Unit:
    """What `fully_shard` or `replicate` exchange together, watched: how often it ran, and which
    gradients it had.
    """

    def __init__(self, group: Any, name: str, roll: RollCall | None) -> None:
        self.group, self.name, self.roll, self.calls = group, name, roll, 0
        self.used: set[int] = set()  # its parameters that backward has reached in this update
        # is a first backward pass part of the loss? It gives no weight a gradient
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
        """Before gradients are exchanged: zeros for those that this rank's rows do not have, as all
        ranks send alike.

        And those of one unit in one format: what waits from earlier micro-batches may be in that of
        the sum.
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
    """Have every unit of the model, or of a stage, watched from now on; `ranks` share them."""
    roll, found = RollCall(ranks) if is_foreign(model) and len(ranks) > 1 else None, []
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            groups = module._get_fsdp_state()._fsdp_param_groups
            found += [Unit(group, name, roll) for group in groups]
    model.watched = found  # type: ignore[assignment]


def units(model: nn.Module) -> list[Unit]:
    return [unit for piece in pieces(model) for unit in getattr(piece, "watched", ())]


def begin_update(model: nn.Module) -> None:
    for roll in filter(None, {unit.roll for unit in units(model)}):
        roll.begin_update()
    for unit in units(model):
        unit.calls = 0
        unit.used.clear()


def accumulate_losses(model: nn.Module, are: bool) -> None:
    """Say whether updates' losses hold gradients of the model."""
    for unit in units(model):
        unit.twice = are


def unused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What has a gradient of zeros alone, since backward has not reached it."""
    return [
        p.sharded_param
        for unit in units(model)
        for p in unit.group.fsdp_params
        if id(p) not in unit.used
    ]


def unit_calls(model: nn.Module) -> dict[str, int]:
    """How often each block has run; all the rest of a model runs on every rank."""
    return {unit.name: unit.calls for unit in units(model) if unit.name}


def refuse_sharing(model: nn.Module, strategy: str) -> None:
    """Raise ValueError for a weight that stands in two units, which would each keep a copy of
    their own.
    """
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
