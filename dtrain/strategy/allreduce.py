"""Data parallel by hand: every rank reads its own rows; after backward, one all-reduce for each
gradient.

    rank 0: W, rows 0-3 -> g0 \\
    rank 1: W, rows 4-7 -> g1 /  sum, divide by 2 -> the same gradient and step on every rank

The same mathematics as ddp, in one loop. ddp differs in when it sends: in buckets, while backward
still runs. Cost a step, per rank: one all-reduce for each gradient it holds, 2 (n-1)/n times its
bytes on a ring. Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD" (1706.02677).
"""

from __future__ import annotations

from torch import nn

from dtrain.parallel.footprint import Footprint
from dtrain.parallel.messages import Message, all_reduce_each
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_mean, gradients


class AllReduce(Strategy):
    """Average gradients over `dp`, whatever other strategies have left of them on this rank.

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
