"""Fully sharded data parallel (ZeRO-3): each rank keeps 1/n of every weight, gradient and moment.

    forward:   all-gather a block's weights -> compute -> free them
    backward:  all-gather them again -> compute -> reduce-scatter the block's gradients
    step:      each rank updates its own slice, with its own slice of Adam's moments

Cost a micro-batch, per rank: all-gather of all weights twice (once without resharding: ZeRO-2), and
a step: reduce-scatter of all gradients; each moves (n-1)/n of the bytes.
Memory between steps: 1/n of all three kinds. In a step of several micro-batches the whole gradient
stays until the last one's reduce-scatter, unless each of them is reduced.
Sources: Rajbhandari et al. 2020, "ZeRO" (1910.02054); Zhao et al. 2023, "PyTorch FSDP"
(2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.model.layout import blocks_of, refuse_complex
from dtrain.parallel.checks.optimizer import ROWS
from dtrain.parallel.checks.rehearsal import Rehearsal, unit_by_unit
from dtrain.parallel.footprint import FORWARD, FREE, Footprint, chunk_shape
from dtrain.parallel.fsdp_units import (
    begin_update,
    refuse_sharing,
    unit_calls,
    unused_parameters,
    watch_units,
)
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import ParallelContext, Strategy, local_part
from dtrain.strategy.replicate import Replicate, fsdp_module, kept_gathered, reshard

ELSEWHERE = (
    "a block may use no weight of another one, since a rank then holds a part of it only: use "
    "strategy=ddp or allreduce"
)


class FSDP(Strategy):
    """Shard over `fsdp`, one unit for each block and one for all the rest (embedding and head).

    Args:
        degree: ranks along `fsdp`; -1: the rest of the world.
        reshard_after_forward: free the gathered weights after forward (ZeRO-3) or keep them until
            backward has used them (ZeRO-2: less traffic, more memory).
        reduce_each: reduce-scatter the gradients of every micro-batch: less memory, more traffic.
        cpu_offload: keep shards, gradients and moments in host memory and step there (for GPUs).
    """

    name = "fsdp"
    axis = "fsdp"
    stepped = (ROWS,)
    casts_itself = True

    def __init__(
        self,
        degree: int = REST,
        *,
        reshard_after_forward: bool = True,
        reduce_each: bool = False,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(degree)
        self.reshard_after_forward, self.reduce_each = reshard_after_forward, reduce_each
        self.offloads = cpu_offload

    def check(self, plan: ParallelContext) -> None:
        pipeline = plan.strategy_on("pp")
        if pipeline is None:
            return
        if self.reduce_each:
            raise ValueError(
                "strategy.fsdp.reduce_each=true: a pipeline reduces once a step; use "
                "reduce_each=false"
            )
        if self.reshard_after_forward and pipeline.splits_backward:
            schedule = getattr(pipeline, "kind", type(pipeline).__name__)
            raise ValueError(
                f"schedule {schedule} computes the gradients of weights after those of inputs, and "
                f"resharded weights miss them: use strategy.fsdp.reshard_after_forward=false"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        refuse_sharing(model, "fsdp")
        refuse_complex(model, "fsdp")
        for name, parameter in model.named_parameters():
            if not parameter.ndim or not parameter.numel():
                what = "has no numbers" if parameter.ndim else "is a single number"
                raise ValueError(
                    f"{name} of {type(model).__name__} {what}, and fsdp divides by rows: "
                    f"give it the shape (1,), or use strategy=ddp, allreduce or zero1"
                )

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        if blocks_of(model):
            what = "with each block's weights in its own call alone"
            yield Rehearsal(what, model, unit_by_unit(model), ELSEWHERE)

    def parallelize(self, model: nn.Module, plan: ParallelContext) -> nn.Module:
        mesh = plan.mesh[self._mesh_axes(plan)]
        settings: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": plan.precision.fsdp_policy(),
        }
        if self.offloads:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=plan.device.type == "cuda")
        for module in (*blocks_of(model), model):
            fully_shard(module, **settings)
        watch_units(model, mesh.mesh.flatten().tolist())
        return model

    def _mesh_axes(self, plan: ParallelContext) -> tuple[str, ...]:
        """Return both axes beside `replicate`: its all-reduce then overlaps with backward."""
        return ("dp", "fsdp") if isinstance(plan.strategy_on("dp"), Replicate) else ("fsdp",)

    def verify(self, model: nn.Module, plan: ParallelContext) -> None:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded over {self.axis}"
            axes, rows = parameter.device_mesh.mesh_dim_names or (), parameter.shape[0]
            # inner axes first: a slice of rows that tensor parallelism has cut is cut again
            for axis, placement in reversed([*zip(axes, parameter.placements, strict=True)]):
                if isinstance(placement, Shard | _StridedShard) and placement.dim == 0:
                    rank = plan.mesh[axis].get_local_rank()
                    (rows,) = chunk_shape((rows,), 0, plan.degrees[axis], rank)
                assert axis != self.axis or not placement.is_replicate(), (
                    f"{name} is {placement} over {axis}"
                )
            here = local_part(parameter).shape[0]
            assert here == rows, f"{name}: {here} rows here, not {rows}"

    def double_backward_context(self, model: nn.Module) -> AbstractContextManager[None]:
        return kept_gathered(model)

    def begin_update(self, model: nn.Module) -> None:
        begin_update(model)

    def sync_gradients(self, model: nn.Module, enabled: bool) -> None:
        fsdp_module(model).set_requires_gradient_sync(enabled or self.reduce_each)

    def unused(self, model: nn.Module) -> list[nn.Parameter]:
        return unused_parameters(model)

    def unit_calls(self, model: nn.Module) -> dict[str, int]:
        return unit_calls(model)

    def after_evaluation(self, model: nn.Module) -> None:
        reshard(model)

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        n, here = self.degree, footprint.place[self.axis]
        return footprint.map(lambda piece: piece.map(lambda w: w.shard(self.axis, n, here)))

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        n, gathered = self.degree, []
        for piece in footprint.pieces:
            for unit, weights in piece.units.items():
                size = n * sum(weight.padded(n) for weight in weights)
                gathered += [size] * self._gathers(piece.passes_of(unit, footprint.micro_batches))
        reduced = [n * size for size in footprint.unit_gradients(n, each=self.reduce_each)]
        return [
            message(self.axis, "all_gather", gathered, footprint.compute_bytes),
            message(self.axis, "reduce_scatter", reduced, footprint.reduce_bytes),
        ]

    def _gathers(self, passes: tuple[str, ...]) -> int:
        """Return how often a unit's weights are needed and not here."""
        count, here = 0, False
        for step in passes:
            count += step != FREE and not here
            here = step != FREE and (step != FORWARD or not self.reshard_after_forward)
        return count
