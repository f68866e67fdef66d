"""Data parallel by hand: each rank reads its own rows, and all average their gradients.

    rank 0: W, rows 0-3 -> backward -> g0 \\
    rank 1: W, rows 4-7 -> backward -> g1 /  all-reduce: (g0 + g1) / 2 -> the same step on both

The same mathematics as ddp, in one loop. ddp differs in when it sends: in buckets, while backward
still runs.
Cost a step, per rank: one all-reduce for each gradient it holds, 2 (n-1)/n times its bytes on a
ring.
Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD" (1706.02677).
"""

from __future__ import annotations

from torch import nn

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message, all_reduce_each
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_mean, gradients


class AllReduce(Strategy):
    """Average over `dp` what other strategies have left of the gradients on this rank.

    Args:
        degree: ranks along `dp`; -1: the rest of the world.
    """

    name = "allreduce"
    axis = "dp"

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        all_reduce_mean(
            gradients(model).values(), plan.mesh[self.axis].get_group(), plan.precision.reduce_dtype
        )

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        return [all_reduce_each(self.axis, footprint.gradients, footprint.reduce_bytes)]
