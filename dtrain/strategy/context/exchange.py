"""Attention over sequences of which each rank holds a slice: by a ring, or by exchanging tokens for
heads.

    B batch, T tokens, n ranks, D features of a head, H query heads, G key and value heads.

Sources: Liu et al. 2023, "Ring Attention" (2310.01889); Jacobs et al. 2023, "DeepSpeed Ulysses"
(2309.14509); Dao et al. 2022, "FlashAttention" (2205.14135: how partial softmaxes are merged, and
the backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

QUERIES = 1024  # whose scores are there at a time: (B, H, QUERIES, T/n) numbers


def is_plain_attention(core: Any) -> bool:
    """Is this attention softmax(q k' / sqrt(D)) v, the only one that a ring computes?

    Tried on a few numbers.
    """
    if any(True for _ in (*core.parameters(), *core.buffers())):
        return False
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        return torch.allclose(core(q, k, v), plain_attention(q, k, v, core.causal))


# (B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)
def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(D)) v, as a ring computes it on one rank."""
    return _forward(_grouped(q, k), torch.stack((k, v)), causal)[0].flatten(1, 2)


class Ring(nn.Module):
    """Attention over the whole sequence, of which this rank holds a slice.

    A collective, as its backward is.
    """

    def __init__(self, core: Any, group: dist.ProcessGroup, balanced: bool) -> None:
        super().__init__()
        self.causal, self.balanced, self.group = core.causal, balanced, group
        self.rank, self.size = group.rank(), group.size()

    @torch.compiler.disable
    # (B, H, T/n, D), 2 x (B, G, T/n, D) -> as q
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return RingAttention.apply(q, k, v, self)

    def tour(self, k: Tensor, v: Tensor) -> Iterator[tuple[Any, Any, bool, Tensor]]:
        """At every hop: which of my tokens see which of the owner's, masked or not, and its
        keys and values.
        """
        kv, everything, half = torch.stack((k, v)), slice(None), k.shape[-2] // 2
        for hop in range(self.size):
            # on its way while the caller computes
            arrive = self.send(kv) if hop < self.size - 1 else None
            mine = theirs = everything
            # the owner's tokens come later; of two chunks, before my late one
            if self.causal and hop > self.rank:
                mine = slice(half, None) if self.balanced else slice(0)
            elif self.causal and hop and self.balanced:
                # earlier; its late chunk after both of mine
                theirs = slice(half)
            yield (..., mine, everything), (..., theirs, everything), self.causal and not hop, kv
            kv = arrive() if arrive else kv

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to pass a tensor on to the next rank; call the result to wait for the previous
        rank's.
        """
        if self.size == 1:
            return lambda: tensor
        received = torch.empty_like(tensor)
        after = (self.rank + 1) % self.size
        before = (self.rank - 1) % self.size
        messages = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=before),
        ]
        works = dist.batch_isend_irecv(messages)

        def arrive() -> Tensor:
            for work in works:
                work.wait()
            return messages[1].tensor  # the list keeps what is sent alive, too

        return arrive


class RingAttention(Function):
    """The tour forward and backward, in fp32 at least; query heads beside their key head: (B,
    G, H/G, T/n, D).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        queries = _grouped(q, k)
        out, lse = torch.zeros_like(queries), torch.full_like(queries[..., :1], -torch.inf)
        with torch.autocast(q.device.type, enabled=False):
            for mine, theirs, masked, kv in ring.tour(k, v):
                part, part_lse = _forward(queries[mine], kv[theirs], masked)
                # A part is a softmax over its own keys, divided by exp(part_lse): it has that share
                # of the total.
                total = torch.logaddexp(lse[mine], part_lse)
                out[mine] = out[mine] * (lse[mine] - total).exp() + part * (part_lse - total).exp()
                lse[mine] = total
        y = out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.ring = ring
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        queries, dy = _grouped(q, k), _grouped(gradient, k)
        delta = (dy * _grouped(y, k)).sum(-1, keepdim=True)
        dq, home = torch.zeros_like(queries), None
        with torch.autocast(q.device.type, enabled=False):
            for mine, theirs, masked, kv in ctx.ring.tour(k, v):
                dkv = torch.zeros_like(kv, dtype=dq.dtype)
                part, dkv[theirs] = _backward(
                    queries[mine], lse[mine], dy[mine], delta[mine], kv[theirs], masked
                )
                dq[mine] += part
                home = ctx.ring.send(dkv + home() if home else dkv)  # follows its keys and values
        assert home is not None
        dk, dv = home()
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    return x.unflatten(1, (k.shape[1], -1)).to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, first: int | None) -> Tensor:
    """(.., t, D), (.., T, D) -> (.., t, T); a causal mask where `first` says which token the
    first query is.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if first is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + first)
        scores.masked_fill_(later, -torch.inf)
    return scores


def _forward(q: Tensor, kv: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    k, v = kv.unsqueeze(3).to(q.dtype)
    out, lse = torch.empty_like(q), torch.empty_like(q[..., :1])
    for first in range(0, q.shape[-2], QUERIES):
        rows = (..., slice(first, first + QUERIES), slice(None))
        scores = _scores(q[rows], k, first if masked else None)
        lse[rows] = scores.logsumexp(-1, keepdim=True)
        out[rows] = scores.sub_(lse[rows]).exp_() @ v
    return out, lse


def _backward(  # p = softmax(scores), y = p v, delta = sum(dy y) -> gradients of q and kv
    q: Tensor, lse: Tensor, dy: Tensor, delta: Tensor, kv: Tensor, masked: bool
) -> tuple[Tensor, Tensor]:
    k, v = kv.unsqueeze(3).to(q.dtype)
    dq, dkv = torch.empty_like(q), torch.zeros_like(kv, dtype=q.dtype)
    for first in range(0, q.shape[-2], QUERIES):
        rows = (..., slice(first, first + QUERIES), slice(None))
        p = _scores(q[rows], k, first if masked else None).sub_(lse[rows]).exp_()
        ds = p * (dy[rows] @ v.mT - delta[rows]) / math.sqrt(q.shape[-1])
        dq[rows] = ds @ k
        dkv += torch.stack((ds.mT @ q[rows], p.mT @ dy[rows])).sum(3)
    return dq, dkv


class Ulysses(nn.Module):
    """The model's own attention, over all tokens of this rank's heads.

    A collective, as its backward is.
    """

    def __init__(self, core: nn.Module, group: dist.ProcessGroup, balanced: bool) -> None:
        super().__init__()
        self.core, self.group = core, group

    @torch.compiler.disable
    # (B, H, T/n, D), 2 x (B, G, T/n, D) -> as q
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] % self.group.size():
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        y = self.core(*(Swap.apply(x, 1, 2, self.group) for x in (q, k, v)))
        return Swap.apply(y, 2, 1, self.group)


class Swap(Function):
    """Cut one dim into a piece for each rank, join what the ranks send along another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
        ctx.back = joined, cut, group
        pieces = torch.stack(x.chunk(group.size(), cut))
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=group)
        return torch.cat(received.unbind(), joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return Swap.apply(gradient, *ctx.back), None, None, None
