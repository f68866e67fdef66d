"""ZeRO-1: data parallel in which each rank keeps optimizer states for its share of the weights.

    backward:  every rank has every gradient, averaged (all-reduce)
    step:      rank 0 updates W0 with its moments of W0; rank 1 updates W1 with its moments of W1
    then:      rank 0 broadcasts W0, rank 1 broadcasts W1 -> all of W on every rank

Whole parameters are given out, the largest first, each to the rank that has least: so any optimizer
works.
Cost a step, per rank: all-reduce of the gradients and broadcasts of all weights, together 3 (n-1)/n
times their bytes, where ddp has 2 (and so would ZeRO's own reduce-scatter and all-gather: see
zero2).
Memory: 1/n of the optimizer's states, or as much as those of the largest tensor.
Source: Rajbhandari et al. 2020, "ZeRO" (1910.02054), P_os.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain.model.layout import refuse_complex
from dtrain.parallel.checks.optimizer import APART
from dtrain.parallel.footprint import Footprint, Weight
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import ParallelContext, local_part
from dtrain.strategy.allreduce import AllReduce

P = TypeVar("P", nn.Parameter, Weight)


class Zero1(AllReduce):
    """Divide the optimizer's states over `dp`. Composes as allreduce does.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
    """

    name = "zero1"
    stepped = (APART,)

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        super().check_model(model, plan)
        refuse_complex(model, "zero1")

    def optimizer(self, optimizer: Optimizer, model: nn.Module, plan: ParallelContext) -> Optimizer:
        group, rank = plan.mesh[self.axis].get_group(), plan.mesh[self.axis].get_local_rank()
        parameters = [p for settings in optimizer.param_groups for p in settings["params"]]
        shares = equal_shares(parameters, self.degree)
        own = {id(parameter) for parameter in shares[rank]}
        for settings in optimizer.param_groups:
            settings["params"] = [p for p in settings["params"] if id(p) in own]

        def exchange(*_: Any) -> None:
            for owner, share in enumerate(shares):
                _broadcast(share, owner, group)

        optimizer.register_step_post_hook(exchange)
        return optimizer

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        here = footprint.place[self.axis]
        own = {id(weight) for shares in self._shares(footprint) for weight in shares[here]}
        return footprint.map(lambda piece: piece.map(lambda w: replace(w, stepped=id(w) in own)))

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        shares = [share for of_model in self._shares(footprint) for share in of_model if share]
        sizes = [sum(prod(weight.held) for weight in share) for share in shares]
        broadcasts = message(self.axis, "broadcast", sizes, footprint.weight_bytes)
        return [*super().cost(footprint, plan), broadcasts]

    def _shares(self, footprint: Footprint) -> list[list[list[Weight]]]:
        """Return the weights that each rank steps, for each model.

        Weights of one size are given out in the order of the model, not of its optimizer.
        """
        by_model: dict[str, list[Weight]] = {}
        for piece in footprint.pieces:
            trained = [weight for weight in piece.weights if weight.ready is not None]
            by_model.setdefault(piece.model, []).extend(trained)
        return [equal_shares(weights, self.degree) for weights in by_model.values()]


def equal_shares(
    parameters: list[P], shares: int, size: Callable[[P], int] = lambda p: p.numel()
) -> list[list[P]]:
    """Return the parameters in `shares` lists of about equal size: the same on every rank.

    Args:
        size: of a whole parameter.
    """
    lists: list[list[P]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for parameter in sorted(parameters, key=lambda p: -size(p)):
        least = sizes.index(min(sizes))
        lists[least].append(parameter)
        sizes[least] += size(parameter)
    return lists


@torch.no_grad()
def _broadcast(parameters: list[nn.Parameter], owner: int, group: dist.ProcessGroup) -> None:
    """Send what `owner` holds of the parameters to every rank of the group, in one message."""
    values = [local_part(parameter) for parameter in parameters]
    if not values:
        return
    sizes = [value.numel() for value in values]
    flat = (
        torch.cat([value.flatten() for value in values])
        if group.rank() == owner
        else values[0].new_empty(sum(sizes))
    )
    dist.broadcast(flat, group=group, group_src=owner)
    for value, received in zip(values, torch.split(flat, sizes), strict=True):
        value.copy_(received.view_as(value))
