"""Context parallel: each rank holds a slice of every sequence; attention alone needs the other
slices.

    balanced, n = 2:  sequence 0 1 2 3 -> rank 0: 0 3, rank 1: 1 2  (equal work under a causal mask)
    ring, forward:    queries stay; keys and values go round, one hop while those at hand are used
    ring, backward:   keys and values go round again, their gradients behind them, home after n hops
    ulysses:          all-to-all: my tokens, all heads -> all tokens, my heads -> attention -> back

Cost a block and micro-batch, per rank, with S bytes in its queries and g = key heads / query heads:
ring 2g(n-1)S forward, 2g(2n-1)S backward (in bf16 2g(3n-1)S: gradients go round in fp32); ulysses
(2+2g)S(n-1)/n forward and again backward; n divides the heads (if not the key heads: g = 1, they
are repeated). Activations: 1/n. A step: one all-reduce for each gradient, after backward. Sources:
Liu et al. 2023, "Ring Attention" (2310.01889); Jacobs et al. 2023, "DeepSpeed Ulysses"
(2309.14509); Llama team 2024 (2407.21783: early and late chunks); Dao et al. 2022, "FlashAttention"
(2205.14135: the merge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtrain.model.layout import blocks_of, divisors, is_ours, layout_of, modules_at, multiples
from dtrain.parallel.checks.rehearsal import Rehearsal, Unmixed, shared_copy
from dtrain.parallel.footprint import Footprint, ModelPart
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, all_reduce_each, message
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_mean, gradients
from dtrain.strategy.context.exchange import Ring, Ulysses, is_plain_attention, plain_attention
from dtrain.task.batch import Batch

if TYPE_CHECKING:
    from dtrain.task.base import Task

MIXED = (
    "something besides the Layout's `attention` looks at other tokens (a convolution, a running "
    "mean), or counts positions by itself: use the `positions` that it is given, or a strategy on "
    "another axis"
)
NOT_PLAIN = (
    "its attention is not softmax(q k' / sqrt(D)) v at this length (a window?): use "
    "strategy.cp.method=ulysses"
)
HEADS_DIFFER = (
    "its attention treats heads differently: use strategy.cp.method=ring, or another axis"
)
METHODS: dict[str, Any] = {"ring": Ring, "ulysses": Ulysses}


class ContextParallel(Strategy):
    """Cut sequences over `cp`, and exchange within the module that the model's Layout names
    `attention`.

    Args:
        degree: ranks along `cp`; -1: the rest of the world.
        method: ring or ulysses.
        balanced: in a ring each rank takes an early and a late chunk; false: one chunk.
    """

    name = "context"
    axis = "cp"
    divides = "tokens"

    def __init__(self, degree: int = REST, *, method: str = "ring", balanced: bool = True) -> None:
        super().__init__(degree)
        self.method, self.balanced = method, balanced and method == "ring"
        self.chunks = 2 if self.balanced else 1  # of each sequence, on each rank

    def check(self, plan: ParallelContext) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"strategy.cp.method={self.method} is unknown: use {', '.join(METHODS)}"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        cores = _cores(model)
        if not cores or len(cores) < len(blocks_of(model)):
            raise ValueError(
                f"{type(model).__name__} names no `attention` in its Layout: nothing to exchange "
                f"over cp; "
                f"use a strategy on dp or fsdp"
            )
        if self.method == "ring" and (dropout := max(core.dropout for core in cores)):
            raise ValueError(
                f"ring attention cannot drop attention weights (dropout={dropout}): "
                f"use strategy.cp.method=ulysses or model.dropout=0"
            )
        if self.method == "ring" and not all(is_plain_attention(core) for core in cores):
            raise ValueError(
                f"the attention of {type(model).__name__} is not softmax(q k' / sqrt(D)) v, as "
                f"a ring "
                f"computes it: use strategy.cp.method=ulysses"
            )
        if any(getattr(module, "whole_rows", False) for module in model.modules()):
            raise ValueError(
                f"the experts of {type(model).__name__} count the tokens of whole sequences, "
                f"which cp="
                f"{self.degree} cuts: use model.capacity_factor=null and model.balance=bias"
            )
        tp, heads = plan.degrees.get("tp", 1), getattr(model, "n_heads", 0)
        if self.method == "ulysses" and not heads:
            raise ValueError(
                f"{type(model).__name__} does not say its number of heads (n_heads): use "
                f"strategy.cp.method=ring"
            )
        if self.method == "ulysses" and (mine := heads // tp) % self.degree:
            split = f" / tp={tp}" if tp > 1 else ""
            raise ValueError(
                f"n_heads={heads}{split} is not divisible by cp={self.degree}: use {divisors(mine)}"
            )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        lengths = {name: t.shape[1] if t.ndim > 1 else 1 for name, t in task.batch(0).items()}
        if not any("positions" in getattr(update, "inputs", ()) for update in task.updates):
            raise ValueError(
                f"task {type(task).__name__} tells its model no `positions`: each rank would "
                f"count its "
                f"own tokens from 0; name them in its update's inputs, or use strategy=ddp"
            )
        length = max(lengths.values())
        if whole := [name for name, each in lengths.items() if each != length]:
            raise ValueError(
                f"`{whole[0]}` of the batch is not one value a token: cp={self.degree} cannot "
                f"cut it; "
                f"use a strategy on another axis"
            )
        self._check_length(length)

    def _check_length(self, length: int) -> None:
        parts = self.degree * self.chunks
        if length % parts:
            near = multiples(length, parts)
            factor, why = (
                ("2 x ", " (each rank takes two chunks of the balanced ring)")
                if self.balanced
                else ("", "")
            )
            other = ", or strategy.cp.balanced=false" if length % self.degree == 0 else ""
            raise ValueError(
                f"seq_len={length} is not divisible by {factor}cp={self.degree}{why}: use "
                f"{near}{other}"
            )

    def shard(self, batch: Batch, plan: ParallelContext) -> Batch:
        rank = plan.mesh[self.axis].get_local_rank()
        return {
            name: self._mine(tensor, rank) if tensor.ndim > 1 else tensor
            for name, tensor in batch.items()
        }

    def _mine(self, tensor: Tensor, rank: int) -> Tensor:  # (B, T, ...) -> (B, T/n, ...)
        self._check_length(tensor.shape[1])  # of every batch, as lengths may differ
        chunks = tensor.tensor_split(self.degree * self.chunks, dim=1)
        return (
            torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)
            if self.balanced
            else chunks[rank].contiguous()
        )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        apart, path, ranks = shared_copy(model), layout_of(model).attention, range(self.degree)
        core, tokens = _cores(model)[0], max(x.shape[1] for x in inputs if x.ndim > 1)
        for block in blocks_of(apart):
            block.set_submodule(path, Unmixed(block.get_submodule(path)))

        def sliced(*inputs: Tensor) -> Tensor:
            def mine(rank: int) -> Iterator[Tensor]:
                return (self._mine(x, rank) if x.ndim > 1 else x for x in inputs)

            return torch.cat([apart(*mine(rank)) for rank in ranks], 1)

        def whole(*inputs: Tensor) -> Tensor:
            outputs = apart(*inputs)
            return torch.cat([self._mine(outputs, rank) for rank in ranks], 1)

        what = f"in slices of its sequences (cp={self.degree}, attention left out)"
        yield Rehearsal(what, whole, sliced, MIXED)
        if not is_ours(core):
            yield self._core(core, tokens)

    def _core(self, core: Any, tokens: int) -> Rehearsal:
        """The model's attention, and what stands in for it on the ranks: at this length."""
        q, k, v = torch.randn(
            3, 1, 2, tokens, 4, generator=torch.Generator().manual_seed(0)
        ).double()

        def whole(*_: Tensor) -> Tensor:
            return core(q, k, v)

        if self.method == "ring":
            ring = partial(plain_attention, q, k, v, core.causal)
            return Rehearsal("as a ring attends", whole, lambda *_: ring(), NOT_PLAIN)

        def by_head(*_: Tensor) -> Tensor:
            return torch.cat([core(*(x[:, [head]] for x in (q, k, v))) for head in range(2)], 1)

        return Rehearsal("head by head", whole, by_head, HEADS_DIFFER)

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        path, group = layout_of(model).attention, plan.mesh[self.axis].get_group()
        for block in blocks_of(model):
            block.set_submodule(
                path, METHODS[self.method](block.get_submodule(path), group, self.balanced)
            )
        return model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for core in _cores(model):
            assert type(core) is METHODS[self.method], (
                f"attention is {type(core).__name__}, not {self.method}"
            )

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        all_reduce_mean(
            gradients(model).values(), plan.mesh[self.axis].get_group(), plan.precision.reduce_dtype
        )

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        if self.method == "ring":
            return footprint

        def swapped(piece: ModelPart) -> ModelPart:
            """What attention gives is kept by its own backward, and again as rows of all heads."""
            layout = layout_of(piece.outline)
            cores = {
                call.path for call in piece.calls_at((f"{layout.blocks}.*.{layout.attention}",))
            }
            more = (kept for kept in piece.kept if kept.path in cores and len(kept.shape) == 4)
            return replace(piece, kept=(*piece.kept, *more))

        return footprint.map(swapped)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        n, m, itemsize = self.degree, footprint.micro_batches, footprint.compute_bytes
        found = [all_reduce_each(self.axis, footprint.gradients, footprint.reduce_bytes)]
        for call in footprint.calls_at(lambda layout: (f"{layout.blocks}.*.{layout.attention}",)):
            q, k = call.inputs[:2]  # (B, H, T/n, D), (B, G, T/n, D)
            both_ways = 1 + call.graded
            if self.method == "ulysses":
                kv = q if k[1] % n else k
                sizes = [prod(x) for x in (q, kv, kv, q)] * both_ways
                found.append(message(self.axis, "all_to_all", sizes, itemsize, m))
            else:
                found.append(
                    message(self.axis, "send", [2 * prod(k)] * (n - 1) * both_ways, itemsize, m)
                )
                found.append(
                    message(self.axis, "send", [2 * prod(k)] * n * call.graded, max(4, itemsize), m)
                )
        return found


def _cores(model: nn.Module) -> list[Any]:
    path = layout_of(model).attention
    return (
        [core for block in blocks_of(model) for _, core in modules_at(block, (path,))]
        if path
        else []
    )
