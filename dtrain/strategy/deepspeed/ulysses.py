"""Ulysses by DeepSpeed's DistributedAttention, beside its ZeRO on `dp`.

    a rank's tokens, all heads -> all-to-all -> all tokens, a rank's heads -> attention
                               <- all-to-all <-

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
from dtrain.parallel.strategy import ParallelContext, Strategy
from dtrain.strategy.context.strategy import ContextParallel
from dtrain.strategy.deepspeed.library import ENGINE, check_beside_zero, imported


class DeepSpeedUlysses(ContextParallel):
    """Cut sequences over `cp`, and swap heads for tokens by DeepSpeed; beside its ZeRO on `dp`.

    Args:
        degree: ranks along `cp`; -1: the rest of the world.
    """

    name = "deepspeed_ulysses"
    engine = ENGINE

    def __init__(self, degree: int = REST) -> None:
        super().__init__(degree, method="ulysses")

    def check(self, plan: ParallelContext) -> None:
        check_beside_zero(plan, self.name, "strategy=context strategy.cp.method=ulysses")
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
        for block in blocks_of(model):
            core = block.get_submodule(layout_of(model).attention)
            assert isinstance(core, Swapping), f"{type(core).__name__} is not DeepSpeed's attention"

    reduce_gradients = Strategy.reduce_gradients  # nothing: the engine sums along both axes

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        raise ValueError("the messages of DeepSpeed's Ulysses are not told")


class Swapping(nn.Module):
    """DeepSpeed's DistributedAttention around a core that has (B, H, T, D)."""

    def __init__(self, core: Any, group: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__()
        self.causal, self.dropout = core.causal, core.dropout
        self.distributed = DistributedAttention(
            Transposed(core), group, scatter_idx=2, gather_idx=1
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
        y: Tensor = self.distributed(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), 0)
        return y.transpose(1, 2)


class Transposed(nn.Module):
    """A core for DeepSpeed, which has tokens before heads: (B, T, H, D)."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *inputs: Tensor) -> Tensor:  # (B, T, H, D) -> (B, T, H, D)
        y: Tensor = self.core(*(x.transpose(1, 2) for x in inputs))
        return y.transpose(1, 2)
