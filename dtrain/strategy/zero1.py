"""ZeRO-1: data parallel whose optimizer state is divided: each rank steps its own share of the weights.

    backward:  every rank has every gradient, averaged (all-reduce)
    step:      rank 0 updates W0 with its moments of W0; rank 1 updates W1 with its moments of W1
    then:      rank 0 broadcasts W0, rank 1 broadcasts W1 -> all of W on every rank

Whole parameters are given out, the largest first, each to the rank that has least.
Cost a step, per rank: all-reduce of the gradients, and a broadcast of each rank's share: half as much again as
ddp (ZeRO's own reduce-scatter would make it equal: see zero2). Memory: 1/n of the optimizer's states.
Source: Rajbhandari et al. 2020, "ZeRO" (1910.02054), P_os.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain.strategy.allreduce import AllReduce
from dtrain.strategy.base import local

if TYPE_CHECKING:
    from dtrain.plan import Plan


class Zero1(AllReduce):
    """Divide the optimizer's states over `dp`. Composes as allreduce does.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
    """

    def optimizer(self, optimizer: Optimizer, model: nn.Module, plan: Plan) -> Optimizer:
        group, rank = plan.mesh[self.axis].get_group(), plan.mesh[self.axis].get_local_rank()
        shares = shared_out([p for g in optimizer.param_groups for p in g["params"]], self.degree)
        mine = {id(parameter) for parameter in shares[rank]}
        for settings in optimizer.param_groups:
            settings["params"] = [p for p in settings["params"] if id(p) in mine]

        def exchange(*_: Any) -> None:
            for owner, share in enumerate(shares):
                _broadcast(share, owner, group)

        optimizer.register_step_post_hook(exchange)
        return optimizer


def shared_out(parameters: list[nn.Parameter], shares: int) -> list[list[nn.Parameter]]:
    """The parameters in `shares` lists of about equal size, by their global sizes: the same on every rank."""
    given: list[list[nn.Parameter]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        least = sizes.index(min(sizes))
        given[least].append(parameter)
        sizes[least] += parameter.numel()
    return given


@torch.no_grad()
def _broadcast(parameters: list[nn.Parameter], owner: int, group: dist.ProcessGroup) -> None:
    """In one message: what `owner` holds of the parameters, to every rank of the group."""
    values = [local(parameter) for parameter in parameters]
    if not values:
        return
    message = torch.cat([value.flatten() for value in values])
    dist.broadcast(message, group=group, group_src=owner)
    for value, received in zip(values, message.split([value.numel() for value in values]), strict=True):
        value.copy_(received.view_as(value))
