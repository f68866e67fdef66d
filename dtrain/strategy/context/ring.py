"""Ring attention: queries stay on their rank, keys and values go round.

    B batch, T tokens, n ranks, D features of a head, H query heads, G key and value heads

    hop 0:  rank r attends to its own keys and values, and sends them to rank r + 1
    hop h:  rank r attends to those of rank r - h, and sends them on, but for the last hop
    merge:  a hop's output is a softmax over its keys alone; the log of its sum of exponentials
            (lse) says which share of the whole softmax it has

Sources: Liu et al. 2023, "Ring Attention" (2310.01889); Dao et al. 2022, "FlashAttention"
(2205.14135: the merge and the backward pass).
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

QUERIES = 1024  # whose scores are in memory at a time: (B, H, QUERIES, T/n) numbers


class Ring(nn.Module):
    """Attention over whole sequences; this rank holds a slice of each.

    Collective, as its backward pass is.
    """

    def __init__(self, core: Any, group: dist.ProcessGroup, balanced: bool) -> None:
        super().__init__()
        self.causal, self.balanced, self.group = core.causal, balanced, group
        self.rank, self.size = group.rank(), group.size()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    # (B, H, T/n, D), 2 x (B, G, T/n, D) -> (B, H, T/n, D)
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = RingAttention.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        return y

    def tour(self, k: Tensor, v: Tensor) -> Iterator[tuple[Any, Any, bool, Tensor]]:
        """Send keys and values round the ring, and yield at each hop what to compute.

        Each item: the index of queries here, that of the keys that they see, whether a causal mask
        lies on these, and the keys and values of the hop's owner.
        """
        kv, everything, half = torch.stack((k, v)), slice(None), k.shape[-2] // 2
        for hop in range(self.size):
            # on its way while the caller computes
            arrive = self.send(kv) if hop < self.size - 1 else None
            queries = keys = everything
            if self.causal and hop > self.rank:
                # the owner's tokens come later, but, in two chunks, before the late chunk here
                queries = slice(half, None) if self.balanced else slice(0)
            elif self.causal and hop and self.balanced:
                # the owner's early chunk comes before both chunks here, its late chunk after them
                keys = slice(half)
            yield (..., queries, everything), (..., keys, everything), self.causal and not hop, kv
            kv = arrive() if arrive else kv

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to send a tensor to the next rank; return a wait for the previous rank's."""
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
    """Attention during a tour, forward and backward, in fp32 at least.

    Query heads lie beside their key head: (B, G, H/G, T/n, D).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        q_grouped = _grouped(q, k)
        out, lse = torch.zeros_like(q_grouped), torch.full_like(q_grouped[..., :1], -torch.inf)
        with torch.autocast(q.device.type, enabled=False):
            for queries, keys, masked, kv in ring.tour(k, v):
                part, part_lse = _forward(q_grouped[queries], kv[keys], masked)
                # A part is a softmax over its own keys, divided by exp(part_lse): it has that share
                # of the total.
                total = torch.logaddexp(lse[queries], part_lse)
                out[queries] = (
                    out[queries] * (lse[queries] - total).exp() + part * (part_lse - total).exp()
                )
                lse[queries] = total
        y = out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.ring = ring
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        q_grouped, dy = _grouped(q, k), _grouped(gradient, k)
        delta = (dy * _grouped(y, k)).sum(-1, keepdim=True)
        dq, arrive = torch.zeros_like(q_grouped), None
        with torch.autocast(q.device.type, enabled=False):
            for queries, keys, masked, kv in ctx.ring.tour(k, v):
                dkv = torch.zeros_like(kv, dtype=dq.dtype)
                part, dkv[keys] = _backward(
                    q_grouped[queries], lse[queries], dy[queries], delta[queries], kv[keys], masked
                )
                dq[queries] += part
                # gradients follow their keys and values, and come home with the last hop
                arrive = ctx.ring.send(dkv + arrive() if arrive else dkv)
        assert arrive is not None
        dk, dv = arrive()
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def is_plain_attention(core: Any) -> bool:
    """Return whether an attention is softmax(q k' / sqrt(D)) v, the only one that a ring computes.

    It is tried on a few numbers.
    """
    if any(True for _ in (*core.parameters(), *core.buffers())):
        return False
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        return torch.allclose(core(q, k, v), plain_attention(q, k, v, core.causal))


# (B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)
def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return softmax(q k' / sqrt(D)) v, as a ring of one rank computes it."""
    return _forward(_grouped(q, k), torch.stack((k, v)), causal)[0].flatten(1, 2)


def _grouped(x: Tensor, k: Tensor) -> Tensor:  # (B, H, T, D) -> (B, G, H/G, T, D)
    grouped: Tensor = x.unflatten(1, (k.shape[1], -1))  # type: ignore[no-untyped-call]
    return grouped.to(torch.promote_types(x.dtype, torch.float32))


def _forward(q: Tensor, kv: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Return softmax(scores) v, and the log of each query's sum of exponentials."""
    k, v = kv.unsqueeze(3).to(q.dtype)
    out, lse = torch.empty_like(q), torch.empty_like(q[..., :1])
    for first in range(0, q.shape[-2], QUERIES):
        rows = (..., slice(first, first + QUERIES), slice(None))
        scores = _scores(q[rows], k, first if masked else None)
        lse[rows] = scores.logsumexp(-1, keepdim=True)
        out[rows] = scores.sub_(lse[rows]).exp_() @ v
    return out, lse


def _backward(
    q: Tensor, lse: Tensor, dy: Tensor, delta: Tensor, kv: Tensor, masked: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and kv, of p = softmax(scores), y = p v, delta = sum(dy y)."""
    k, v = kv.unsqueeze(3).to(q.dtype)
    dq, dkv = torch.empty_like(q), torch.zeros_like(kv, dtype=q.dtype)
    for first in range(0, q.shape[-2], QUERIES):
        rows = (..., slice(first, first + QUERIES), slice(None))
        p = _scores(q[rows], k, first if masked else None).sub_(lse[rows]).exp_()
        ds = p * (dy[rows] @ v.mT - delta[rows]) / math.sqrt(q.shape[-1])
        dq[rows] = ds @ k
        dkv += torch.stack((ds.mT @ q[rows], p.mT @ dy[rows])).sum(3)
    return dq, dkv


def _scores(q: Tensor, k: Tensor, first: int | None) -> Tensor:
    """(.., t, D), (.., T, D) -> (.., t, T); `first`: the first query's token, for a causal mask."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if first is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + first)
        scores.masked_fill_(later, -torch.inf)
    return scores
