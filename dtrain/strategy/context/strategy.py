"""Context parallel: each rank holds a slice of every sequence; only attention needs the others.

    balanced, n = 2:  sequence 0 1 2 3 -> rank 0: 0 3, rank 1: 1 2  (equal work under a causal mask)
    ring, forward:    queries stay; keys and values go round, a hop while those here are used
    ring, backward:   keys and values go round again, their gradients behind them, home after n hops
    ulysses:          all-to-all: own tokens, all heads -> all tokens, own heads -> attend -> back

Cost a block and micro-batch, per rank, with S bytes in its queries and g = key heads / query heads:
ring: 2g(n-1)S forward, 2g(2n-1)S backward (in bf16 2g(3n-1)S: gradients go round in fp32).
ulysses: (2+2g)S(n-1)/n forward, and the same backward. n must divide the query heads. Where it does
not divide the key heads, these are repeated, so that g = 1.
A step: one all-reduce for each gradient, after backward. Memory: 1/n of the activations.
Sources: Liu et al. 2023, "Ring Attention" (2310.01889); Jacobs et al. 2023, "DeepSpeed Ulysses"
(2309.14509); Llama team 2024 (2407.21783: early and late chunks); Dao et al. 2022, "FlashAttention"
(2205.14135: the merge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtrain.model.layout import (
    Layout,
    blocks_of,
    divisors,
    is_ours,
    layout_of,
    modules_at,
    multiples,
)
from dtrain.parallel.checks.rehearsal import Rehearsal, Unmixed, shared_copy
from dtrain.parallel.footprint import Footprint, ModelPart
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, all_reduce_each, message
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_mean, gradients
from dtrain.strategy.context.ring import Ring, is_plain_attention, plain_attention
from dtrain.strategy.context.ulysses import Ulysses
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
METHODS: dict[str, type[Ring | Ulysses]] = {"ring": Ring, "ulysses": Ulysses}


class ContextParallel(Strategy):
    """Cut sequences over `cp`; ranks exchange in the module that the Layout names `attention`.

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
        cores = attention_cores(model)
        if not cores or len(cores) < len(blocks_of(model)):
            raise ValueError(
                f"{type(model).__name__} names no `attention` in its Layout: nothing to exchange "
                f"over cp; use a strategy on dp or fsdp"
            )
        if self.method == "ring":
            if dropout := max(core.dropout for core in cores):
                raise ValueError(
                    f"ring attention cannot drop attention weights (dropout={dropout}): "
                    f"use strategy.cp.method=ulysses or model.dropout=0"
                )
            if not all(is_plain_attention(core) for core in cores):
                raise ValueError(
                    f"the attention of {type(model).__name__} is not softmax(q k' / sqrt(D)) v, as "
                    f"a ring computes it: use strategy.cp.method=ulysses"
                )
        if any(getattr(module, "whole_rows", False) for module in model.modules()):
            raise ValueError(
                f"the experts of {type(model).__name__} count the tokens of whole sequences, "
                f"which cp={self.degree} cuts: use model.capacity_factor=null and "
                f"model.balance=bias"
            )
        if self.method == "ulysses":
            self._check_heads(model, plan.degrees.get("tp", 1))

    def _check_heads(self, model: nn.Module, tp: int) -> None:
        heads = getattr(model, "n_heads", 0)
        if not heads:
            raise ValueError(
                f"{type(model).__name__} does not say its number of heads (n_heads): use "
                f"strategy.cp.method=ring"
            )
        if (heads_of_rank := heads // tp) % self.degree:
            split = f" / tp={tp}" if tp > 1 else ""
            raise ValueError(
                f"n_heads={heads}{split} is not divisible by cp={self.degree}: use "
                f"{divisors(heads_of_rank)}"
            )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        lengths = {name: t.shape[1] if t.ndim > 1 else 1 for name, t in task.batch(0).items()}
        if not any("positions" in getattr(update, "inputs", ()) for update in task.updates):
            raise ValueError(
                f"task {type(task).__name__} tells its model no `positions`: each rank would "
                f"count its own tokens from 0; name them in its update's inputs, or use "
                f"strategy=ddp"
            )
        length = max(lengths.values())
        if others := [name for name, each in lengths.items() if each != length]:
            raise ValueError(
                f"`{others[0]}` of the batch is not one value a token: cp={self.degree} cannot "
                f"cut it; use a strategy on another axis"
            )
        self._check_length(length)

    def _check_length(self, length: int) -> None:
        parts = self.degree * self.chunks
        if length % parts:
            near = multiples(length, parts)
            factor = "2 x " if self.balanced else ""
            why = " (each rank takes two chunks of the balanced ring)" if self.balanced else ""
            other = ", or strategy.cp.balanced=false" if length % self.degree == 0 else ""
            raise ValueError(
                f"seq_len={length} is not divisible by {factor}cp={self.degree}{why}: use "
                f"{near}{other}"
            )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        """Compare slices without attention; then a user's attention with what replaces it."""
        without, ranks = shared_copy(model), range(self.degree)
        path = layout_of(model).attention
        for block in blocks_of(without):
            block.set_submodule(path, Unmixed(block.get_submodule(path)))

        def sliced(*inputs: Tensor) -> Tensor:
            def slices(rank: int) -> Iterator[Tensor]:
                return (self._slice(x, rank) if x.ndim > 1 else x for x in inputs)

            return torch.cat([without(*slices(rank)) for rank in ranks], 1)

        def whole(*inputs: Tensor) -> Tensor:
            outputs = without(*inputs)
            return torch.cat([self._slice(outputs, rank) for rank in ranks], 1)

        what = f"in slices of its sequences (cp={self.degree}, attention left out)"
        yield Rehearsal(what, whole, sliced, MIXED)
        if not is_ours(core := attention_cores(model)[0]):
            yield self._rehearse_core(core, max(x.shape[1] for x in inputs if x.ndim > 1))

    def _rehearse_core(self, core: Any, tokens: int) -> Rehearsal:
        """Compare the model's attention at this length with what replaces it on the ranks."""
        q, k, v = torch.randn(
            3, 1, 2, tokens, 4, generator=torch.Generator().manual_seed(0)
        ).double()

        def by_head(*_: Tensor) -> Tensor:
            return torch.cat([core(*(x[:, [head]] for x in (q, k, v))) for head in range(2)], 1)

        def as_a_ring(*_: Tensor) -> Tensor:
            return plain_attention(q, k, v, core.causal)

        if self.method == "ring":
            return Rehearsal("as a ring attends", lambda *_: core(q, k, v), as_a_ring, NOT_PLAIN)
        return Rehearsal("head by head", lambda *_: core(q, k, v), by_head, HEADS_DIFFER)

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        path, group = layout_of(model).attention, plan.mesh[self.axis].get_group()
        method = METHODS[self.method]
        for block in blocks_of(model):
            block.set_submodule(path, method(block.get_submodule(path), group, self.balanced))
        return model

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for core in attention_cores(model):
            assert type(core) is METHODS[self.method], (
                f"attention is {type(core).__name__}, not {self.method}"
            )

    def shard(self, batch: Batch, plan: ParallelContext) -> Batch:
        rank = plan.mesh[self.axis].get_local_rank()
        return {
            name: self._slice(tensor, rank) if tensor.ndim > 1 else tensor
            for name, tensor in batch.items()
        }

    def _slice(self, tensor: Tensor, rank: int) -> Tensor:  # (B, T, ...) -> (B, T/n, ...)
        self._check_length(tensor.shape[1])  # of every batch, as lengths may differ
        chunks = tensor.tensor_split(self.degree * self.chunks, dim=1)
        if self.balanced:
            return torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)
        return chunks[rank].contiguous()

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        all_reduce_mean(
            gradients(model).values(), plan.mesh[self.axis].get_group(), plan.precision.reduce_dtype
        )

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        return footprint if self.method == "ring" else footprint.map(_keep_swapped_outputs)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        n, m, itemsize = self.degree, footprint.micro_batches, footprint.compute_bytes
        messages = [all_reduce_each(self.axis, footprint.gradients, footprint.reduce_bytes)]
        for call in footprint.calls_at(_attention):
            q, k = call.inputs[:2]  # (B, H, T/n, D), (B, G, T/n, D)
            both_ways = 1 + call.graded
            if self.method == "ulysses":
                kv = q if k[1] % n else k
                sizes = [prod(x) for x in (q, kv, kv, q)] * both_ways
                messages.append(message(self.axis, "all_to_all", sizes, itemsize, m))
                continue
            keys_and_values = [2 * prod(k)] * (n - 1) * both_ways
            their_gradients = [2 * prod(k)] * n * call.graded
            messages.append(message(self.axis, "send", keys_and_values, itemsize, m))
            messages.append(message(self.axis, "send", their_gradients, max(4, itemsize), m))
        return messages


def attention_cores(model: nn.Module) -> list[Any]:
    """Return the modules of all blocks that the model's Layout names `attention`."""
    path = layout_of(model).attention
    return [
        core
        for block in (blocks_of(model) if path else ())
        for _, core in modules_at(block, (path,))
    ]


def _attention(layout: Layout) -> tuple[str, ...]:
    return (f"{layout.blocks}.*.{layout.attention}",)


def _keep_swapped_outputs(piece: ModelPart) -> ModelPart:
    """Count attention's output twice: its own backward keeps it, and again as rows of all heads."""
    cores = {call.path for call in piece.calls_at(_attention(layout_of(piece.outline)))}
    again = (kept for kept in piece.kept if kept.path in cores and len(kept.shape) == 4)
    return replace(piece, kept=(*piece.kept, *again))
