"""Expert parallel: each rank holds E/n of the experts, and every token travels to its k experts.

    rank 0: its rows -> attention, router \\          / experts 0, 1 \\          / sum over k -> ...
                                           all-to-all                all-to-all
    rank 1: its rows -> attention, router /          \\ experts 2, 3 /          \\ sum over k -> ...

All else is on every rank, as in data parallel: the gradients of the dense weights are averaged over
`ep`. Those of an expert are whole on its rank, as the tokens of all ranks came to it.
Cost a block and micro-batch, per rank: 2 all-to-alls of its tokens (k B T rows of C, of which
(n-1)/n leave it) forward and 2 backward, with E counts ahead; a step: one all-reduce of the dense
gradients. The busiest rank sets the pace.
Memory: 1/n of the experts' weights, gradients and moments.
Sources: Lepikhin et al. 2020, GShard (2006.16668); Fedus et al. 2021, Switch (2101.03961);
Rajbhandari et al. 2022, DeepSpeed-MoE (2201.05596).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from dtrain.model.layout import divisors, experts_of
from dtrain.parallel.checks.optimizer import REGROUPED, ROWS
from dtrain.parallel.checks.rehearsal import Rehearsal, experts_on_ranks
from dtrain.parallel.footprint import Footprint, ModelPart
from dtrain.parallel.messages import Message, all_reduce_each, message
from dtrain.parallel.strategy import ParallelContext, Strategy, all_reduce_mean, local_part

Forward = Callable[[Tensor, Tensor], Tensor]  # (N, C) rows sorted by expert, (E,) counts -> (N, C)

STACKED = (
    "the `experts` of its Layout must stack one expert's weights after another's on dim 0, and "
    "compute each row by its own expert alone"
)


class ExpertParallel(Strategy):
    """Spread the experts that the model's Layout names over `ep`.

    Args:
        degree: ranks along `ep`; -1: the rest of the world.
    """

    name = "expert"
    axis = "ep"
    stepped = (ROWS, REGROUPED)

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        numbers = {p.shape[0] for _, experts in experts_of(model) for p in experts.parameters()}
        if not numbers:
            raise ValueError(
                f"{type(model).__name__} has no experts (model.n_experts=0): nothing to spread "
                f"over ep; use model=moe, or a strategy on dp"
            )
        for number in numbers:
            if number % self.degree:
                raise ValueError(
                    f"n_experts={number} is not divisible by ep={self.degree}: use "
                    f"{divisors(number)} ranks along ep"
                )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        what = f"with its experts spread over ep={self.degree}"
        yield Rehearsal(what, model, experts_on_ranks(model, self.degree), STACKED)

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        group = plan.mesh[self.axis].get_group()
        for _, experts in experts_of(model):
            # by tensor parallelism: that forward finds its own weights
            split_already = "forward" in vars(experts)
            forward = experts.forward if split_already else computes_with_local_weights(experts)
            for name, parameter in list(experts.named_parameters()):
                owner, _, key = name.rpartition(".")
                setattr(experts.get_submodule(owner), key, self._shard(parameter, plan))
            experts.forward = _exchange(forward, group)
        return model

    def _shard(self, parameter: nn.Parameter, plan: ParallelContext) -> nn.Parameter:
        """Return this rank's experts: sharded over `ep`, and within as the parameter was before."""
        axes: tuple[str, ...] = ()
        placements: tuple[Placement, ...] = ()
        if isinstance(parameter, DTensor):
            axes, placements = parameter.device_mesh.mesh_dim_names or (), parameter.placements
        chunks = local_part(parameter.detach()).chunk(self.degree)
        sharded = DTensor.from_local(
            chunks[plan.mesh[self.axis].get_local_rank()].clone(),
            plan.mesh[(self.axis, *axes)],
            (Shard(0), *placements),
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return nn.Parameter(sharded, requires_grad=parameter.requires_grad)

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for _, experts in experts_of(model):
            for name, parameter in experts.named_parameters():
                assert self._shards(parameter), f"{name} is not sharded over {self.axis}"
                rows, here = parameter.shape[0] // self.degree, local_part(parameter).shape[0]
                assert here == rows or plan.strategy_on("fsdp"), (
                    f"{name}: {here} experts here, not {rows}"
                )

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        dense = []
        for parameter in model.parameters():
            if parameter.grad is not None and self._shards(parameter):
                # a sum over the batch's parts of all ranks
                local_part(parameter.grad).div_(self.degree)
            elif parameter.grad is not None:
                dense.append(local_part(parameter.grad))
        all_reduce_mean(dense, plan.mesh[self.axis].get_group(), plan.precision.reduce_dtype)

    def _shards(self, parameter: nn.Parameter) -> bool:
        if not isinstance(parameter, DTensor):
            return False
        names = parameter.device_mesh.mesh_dim_names or ()
        return self.axis in names and parameter.placements[names.index(self.axis)].is_shard(0)

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        n, here = self.degree, footprint.place[self.axis]

        def spread(piece: ModelPart) -> ModelPart:
            names = {
                f"{path}.{key}"
                for path, experts in experts_of(piece.outline)
                for key, _ in experts.named_parameters()
            }
            return piece.map(lambda w: w.split(self.axis, 0, n, here) if w.name in names else w)

        return footprint.map(spread)

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        """Count a rank's rows as if every expert had the same number.

        The sum over the ranks along the axis is exact.
        """
        dense = [weight for weight in footprint.gradients if self.axis not in weight.axes]
        messages = [all_reduce_each(self.axis, dense, footprint.reduce_bytes)]
        for call in footprint.calls_at(lambda layout: (f"{layout.blocks}.*.{layout.experts}",)):
            rows, counts = map(prod, call.inputs)
            messages += [
                message(self.axis, "all_to_all", sizes, itemsize, footprint.micro_batches)
                for sizes, itemsize in (
                    ([counts], torch.long.itemsize),
                    ([rows] * (1 + call.returns), footprint.activation_bytes),
                    ([rows] * (1 + call.graded), footprint.compute_bytes),
                )
            ]
        return messages


def uncompiled(forward: Forward) -> Forward:
    """Leave a forward pass out of torch.compile: its sizes are known when tokens come."""
    disabled: Forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return disabled


def computes_with_local_weights(experts: nn.Module) -> Forward:
    """Return the module's present forward, with this rank's part of the parameters it will have."""
    # a copy that shares the dictionary of parameters: what replaces one there is seen here
    inner = copy.copy(experts)

    @uncompiled
    def forward(x: Tensor, counts: Tensor) -> Tensor:
        inner.training = experts.training  # an attribute of its own, unlike the parameters
        weights = {name: local_part(parameter) for name, parameter in inner.named_parameters()}
        y: Tensor = torch.func.functional_call(inner, weights, (x, counts))
        return y

    return forward


def _exchange(forward: Forward, group: dist.ProcessGroup) -> Forward:
    """Return `forward` on the rows that all ranks have for the experts here, sent back in order."""

    @uncompiled
    def exchanged(x: Tensor, counts: Tensor) -> Tensor:
        counts_here = torch.empty_like(counts)
        dist.all_to_all_single(counts_here, counts, group=group)
        # (n, E/n): rows from each rank for each expert here
        by_rank = counts_here.view(group.size(), -1)
        send, receive = counts.view(group.size(), -1).sum(1).tolist(), by_rank.sum(1).tolist()
        experts = torch.arange(by_rank.shape[1], device=x.device).repeat(group.size())
        # from by rank to by expert
        order = experts.repeat_interleave(counts_here).argsort(stable=True)
        y = _all_to_all(x, send, receive, group)
        y = forward(y.index_select(0, order), by_rank.sum(0))
        return _all_to_all(y.index_select(0, order.argsort()), receive, send, group)

    return exchanged


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0, the next `send[1]` to rank 1 and so on."""
    y: Tensor = _AllToAll.apply(x, send, receive, group)  # type: ignore[no-untyped-call]
    return y


class _AllToAll(torch.autograd.Function):
    """An all-to-all whose gradient travels back the same way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = receive, send, group
        y = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], *ctx.way_back), None, None, None
