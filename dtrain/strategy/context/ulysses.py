"""DeepSpeed Ulysses: the ranks exchange tokens for heads, attend, and exchange back.

    B batch, T tokens, n ranks, D features of a head, H query heads, G key and value heads

    rank 0:  tokens 0-3 of heads 0-3 \\               / all tokens of heads 0, 1 -> attention \\
                                      all-to-all                                      all-to-all
    rank 1:  tokens 4-7 of heads 0-3 /               \\ all tokens of heads 2, 3 -> attention /

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function


class Ulysses(nn.Module):
    """The model's own attention, over all tokens of this rank's heads.

    Collective, as its backward pass is.
    """

    def __init__(self, core: nn.Module, group: dist.ProcessGroup, balanced: bool) -> None:
        super().__init__()
        self.core, self.group = core, group

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    # (B, H, T/n, D), 2 x (B, G, T/n, D) -> (B, H, T/n, D)
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] % self.group.size():
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        y = self.core(*(_swap(x, 1, 2, self.group) for x in (q, k, v)))
        return _swap(y, 2, 1, self.group)


def _swap(x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
    swapped: Tensor = Swap.apply(x, cut, joined, group)  # type: ignore[no-untyped-call]
    return swapped


class Swap(Function):
    """Cut one dim into a piece for each rank, and join what the ranks send along another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = joined, cut, group
        pieces = torch.stack(x.chunk(group.size(), cut))
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return torch.cat(received.unbind(), joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _swap(gradient, *ctx.way_back), None, None, None
