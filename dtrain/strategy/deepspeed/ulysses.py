"""Ulysses by DeepSpeed's DistributedAttention, beside its ZeRO on `dp`.

    my tokens of all heads -> all-to-all -> all tokens of my heads -> attention -> all-to-all ->
    back

DeepSpeed sums gradients, and divides the optimizer's states, over the ranks of `cp` and `dp`
together. Cost a block and micro-batch, per rank: four all-to-alls forward (queries, keys, values,
output) and four backward. Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (2309.14509).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dtrain.model.layout import blocks_of, divisors, layout_of
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message
from dtrain.parallel.strategy import ParallelContext
from dtrain.strategy.context.strategy import ContextParallel, attention_cores
from dtrain.strategy.deepspeed.library import imported


class DeepSpeedUlysses(ContextParallel):
    """Cut sequences over `cp`, and swap heads for tokens by DeepSpeed; beside its ZeRO on `dp`.

    Args:
        degree: ranks along `cp`; -1: the rest of the world.
    """

    name = "deepspeed_ulysses"
    engine = "deepspeed"

    def __init__(self, degree: int = REST) -> None:
        super().__init__(degree, method="ulysses")

    def check(self, plan: ParallelContext) -> None:
        zero = plan.strategy_on("dp")
        if not zero or zero.engine != self.engine or len(plan.strategies) > 2:
            raise ValueError(
                "strategy deepspeed_ulysses goes with DeepSpeed's ZeRO on dp alone: use "
                "strategy=context "
                "strategy.cp.method=ulysses"
            )
        if self.degree < 2:
            raise ValueError(
                f"strategy.cp.degree={self.degree}: DeepSpeed's Ulysses takes 2 or more ranks"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        super().check_model(model, plan)
        if (heads := getattr(model, "n_kv_heads", 0)) % self.degree:
            raise ValueError(
                f"n_kv_heads={heads} is not divisible by cp={self.degree}: use {divisors(heads)}"
            )

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        imported()
        path, group = layout_of(model).attention, plan.mesh[self.axis].get_group()
        for block in blocks_of(model):
            block.set_submodule(path, Swapping(block.get_submodule(path), group))
        return model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for core in attention_cores(model):
            assert isinstance(core, Swapping), (
                f"attention is {type(core).__name__}, not DeepSpeed's"
            )

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        """The engine has, along both axes."""

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        raise ValueError("the messages of DeepSpeed's Ulysses are not told")


class Swapping(nn.Module):
    """DeepSpeed's DistributedAttention around a core, which has heads before tokens: (B, H, T,
    D).
    """

    def __init__(self, core: Any, group: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__()
        self.causal, self.dropout = core.causal, core.dropout
        self.distributed = DistributedAttention(
            Transposed(core), group, scatter_idx=2, gather_idx=1
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.distributed(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), 0)
        return y.transpose(1, 2)


class Transposed(nn.Module):
    """A core for those who have tokens before heads: (B, T, H, D)."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.core(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
